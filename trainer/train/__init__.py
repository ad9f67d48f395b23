"""The training loop, its schedule and its heartbeat."""
