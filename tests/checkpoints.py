"""Checkpoints as ranks write them, of one small parameter: without ranks, without torch."""

import struct

from trainer.run import layout
from trainer.state.checkpoint.manifest import CheckpointManifest
from trainer.state.checkpoint.shard import Contents, EvenDivision, Shard, ShardLayout, write_shard
from trainer.state.optimizer import states_by_name
from trainer.store.store import Store

NAME = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
SHAPE = [4, 5]
ATTEMPT = "000001-000001"


def manifest(step: int, shards: list[Shard] | None = None, eval_loss: float | None = None) -> CheckpointManifest:
    """A manifest of `shards`, or of two that nobody wrote."""
    shards = shards or [Shard(layout.shard(step, ATTEMPT, rank), 400, f"{rank:064x}") for rank in range(2)]
    return CheckpointManifest(
        step=step,
        generation=2,
        world_size=len(shards),
        created=1.5,
        updates=step,
        position={"epoch": 1, "window": 2, "bin": 12},
        dataset="d" * 20,
        order={"seed": 3},
        base={"path": "/models/b", "quant.type": "nf4"},
        adapter={"rank": 4},
        groups={"lora_A": {"weight_decay": 0.1}},
        versions={"torch": "2"},
        eval_loss=eval_loss,
        shapes={NAME: SHAPE},
        shards=shards,
    )


def write_shards(run: Store, step: int, ranks: int = 2, attempt: str = ATTEMPT) -> list[Shard]:
    """Shards whose elements are 1.0, 2.0, ... times the step."""
    division = EvenDivision({NAME: SHAPE[0] * SHAPE[1]}, ranks)
    contents = Contents(division, states_by_name("adamw", {NAME: SHAPE}), ranks)
    shards = []
    for rank in range(ranks):
        intervals = division.intervals(rank)
        values = [float(step * (1 + element)) for begin, end in intervals.values() for element in range(begin, end)] * 3
        data = struct.pack(f"<{len(values)}f", *values)
        shard_layout = ShardLayout(contents.of(rank))
        assert len(data) == shard_layout.size
        shards.append(write_shard(run, layout.shard(step, attempt, rank), shard_layout, memoryview(data)))
    return shards


def commit(
    run: Store, step: int, *, ranks: int = 2, attempt: str = ATTEMPT, eval_loss: float | None = None
) -> CheckpointManifest:
    written = manifest(step, write_shards(run, step, ranks, attempt), eval_loss)
    run.create(layout.manifest(step), written.to_json())
    return written
