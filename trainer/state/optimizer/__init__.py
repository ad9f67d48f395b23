"""Optimizers: what each keeps of a parameter, and how it updates the part of it that one rank has."""
