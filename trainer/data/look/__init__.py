"""Looking at data before it is trained on: a report, and rows as the model sees them."""
