"""Verbs that start runs or go on with them, here and now or on a cluster."""
