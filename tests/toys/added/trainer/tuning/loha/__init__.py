"""A toy method with a setting of its own: LoHa (arXiv:2108.06098), which PEFT has, but not over 4 bits."""
