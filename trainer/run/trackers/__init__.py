"""Places that a run's records are kept in and shown by, a file each behind one protocol (tracker.py)."""
