"""Rows of the vocabulary that learn beside an adapter."""
