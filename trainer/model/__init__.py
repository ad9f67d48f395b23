"""The computing parts of a model: 4-bit weights, attention, the output head with its loss."""
