"""Shards, manifests, retention; saving and restoring what learns."""
