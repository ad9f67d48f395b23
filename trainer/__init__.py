"""Everything one rank runs: data, loading, training, checkpoints. Never imports ray or launcher."""
