"""What a run's folder tells: status, logs, checkpoints, tables."""
