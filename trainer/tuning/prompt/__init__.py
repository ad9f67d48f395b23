"""Learnt embeddings before each document's tokens (prompt tuning, arXiv:2104.08691)."""
