"""A small model of the same kinds of layers as a base, and what becomes of a few tokens in it."""
