"""Bases in FP8, and the tiles that their weights are decoded in."""
