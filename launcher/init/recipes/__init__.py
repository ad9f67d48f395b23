"""Configurations to start from: a table of them, the YAML that each becomes, and small data for a first try."""
