"""Verbs about the model that a run has made: measured, asked, and taken out for other programs."""
