"""Views of a run's folder on a terminal: status, logs, checkpoints, tables."""
