"""The model that the tasks of lm-evaluation-harness ask: that of all ranks, or the one that a server has."""
