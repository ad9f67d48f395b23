"""The driver of a run: it compiles data, starts ranks, and starts them again. sweep.py drives many runs."""
