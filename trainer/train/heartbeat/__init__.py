"""Ranks that hang, and how they are found."""
