"""Rollouts: the answers that the model samples while it learns, their rewards, and the chapters that they become."""
