"""Tries a family's code: a small model of the same kinds of layers as the base computes a few tokens."""
