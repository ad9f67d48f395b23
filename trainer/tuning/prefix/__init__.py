"""Learnt keys and values before each document's own (prefix tuning, arXiv:2101.00190)."""
