"""Group relative policy optimisation: learning from answers that the model samples, and from their rewards."""
