"""LoRA with a learnt length for each row of a weight (DoRA, arXiv:2402.09353)."""
