"""Processes of ours: how each is started so that it ends with its parent, and what ends those that were left."""
