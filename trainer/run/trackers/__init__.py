"""Places that keep and show a run's records, one file each, behind one protocol (tracker.py)."""
