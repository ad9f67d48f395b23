"""Processes of ours: what each imports and which devices it has, how it is started so that it ends with its parent, and what ends those that were left."""
