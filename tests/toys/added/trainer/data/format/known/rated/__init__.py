"""Texts with a rating: a kind of rows with columns of its own."""
