"""`capstan data`: compile and inspect training data."""
