"""Measurements of a sharded model that do not train it: likelihoods, answers, tasks."""
