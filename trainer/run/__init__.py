"""The run's folder: where things are in it, the records, requests to the run, logs and metrics."""
