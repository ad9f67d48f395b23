"""Everything one rank runs: data, loading, training, checkpoints. Never imports ray or launcher."""

from trainer.processes.deferred import defer_imports

# Before any module of ours imports DeepSpeed or transformers.
defer_imports()
