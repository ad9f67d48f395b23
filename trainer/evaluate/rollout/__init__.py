"""Rollouts: answers that the model samples while it learns, what they are worth, and the chapters that they become."""
