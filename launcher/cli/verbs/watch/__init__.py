"""Verbs about a run that is there, going on or ended: what it does, what it left, and how to stop it."""
