"""Learnt rotations of a layer's inputs (OFT, arXiv:2306.07280, arXiv:2506.19847)."""
