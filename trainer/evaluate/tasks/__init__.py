"""The model that the tasks of lm-evaluation-harness ask: the ranks' own, or one on a server."""
