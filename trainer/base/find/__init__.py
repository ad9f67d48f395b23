"""Finds the base and its tokenizer, and checks whether the base can be trained with these settings."""
