"""What a run does every so many steps beside its updates: a file each, found by being there (every.py)."""
