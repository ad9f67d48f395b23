"""Rows that several ranks share: `sharding.sequence_parallel`."""
