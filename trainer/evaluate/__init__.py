"""`capstan evaluate`, `generate`, `teach` and `rollout` on each rank, with the measurements of a training."""
