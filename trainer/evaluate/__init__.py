"""What `capstan evaluate` and `capstan generate` run on each rank: a run's model, before and after its training."""
