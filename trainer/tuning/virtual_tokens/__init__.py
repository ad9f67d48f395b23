"""Learnt virtual tokens before each document (prompt tuning, arXiv:2104.08691; prefix tuning, arXiv:2101.00190)."""
