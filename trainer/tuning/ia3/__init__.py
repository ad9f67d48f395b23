"""Learnt vectors that scale activations ((IA)^3, arXiv:2205.05638)."""
