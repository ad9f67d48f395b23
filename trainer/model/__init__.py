"""What computes: 4-bit weights, attention, the output head with its loss."""
