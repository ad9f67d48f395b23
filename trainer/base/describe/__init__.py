"""Describes a base: derives its architecture from config.json and from the model that transformers builds on `meta`."""
