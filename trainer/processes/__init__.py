"""Processes of ours: what each imports and which devices it has, how it is started so that it ends with its parent,
what ends those that were left, and how the ranks of a run find each other."""
