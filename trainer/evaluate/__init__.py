"""The work of `capstan evaluate` and `capstan generate` on each rank: a run's model, before and after its training."""
