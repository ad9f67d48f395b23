"""The driver of a run: compile, start ranks, start them again; sweep/ drives many."""
