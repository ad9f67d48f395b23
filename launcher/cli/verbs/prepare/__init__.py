"""Verbs before a run: this machine, a configuration and its data, looked at, made or tried in small."""
