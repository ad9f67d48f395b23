"""Decisions as pure functions: what happens after an end."""
