"""The proofs of exports, each in a process of its own."""

from dataclasses import asdict

import torch

from trainer.export.verify import prove_adapter, prove_merged
from trainer.store import open_store


def export_proof(run_uri: str, step: int, adapter: str) -> dict[str, float]:
    """What `capstan export --verify` measures."""
    torch.set_num_threads(1)
    return asdict(prove_adapter(open_store(run_uri), step, open_store(adapter)))


def merge_proof(run_uri: str, step: int, merged: str) -> dict[str, float]:
    """What `capstan export --merge --verify` measures."""
    torch.set_num_threads(1)
    return asdict(prove_merged(open_store(run_uri), step, open_store(merged)))
