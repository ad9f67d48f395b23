"""Actions that a run takes every so many steps, beside its updates. Each is a file here, and every.py finds it."""
