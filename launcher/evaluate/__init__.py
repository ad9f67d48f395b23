"""`capstan evaluate` and `capstan generate`: they run a run's model on this machine's devices, and show its answers."""
