"""Views of a run's folder: status, logs, checkpoints, tables."""
