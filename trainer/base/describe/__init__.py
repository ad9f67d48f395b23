"""What transformers makes of a base: its architecture, read off config.json and the model on `meta`."""
