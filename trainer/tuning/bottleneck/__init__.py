"""Bottleneck adapters after the blocks of each layer (arXiv:1902.00751)."""
