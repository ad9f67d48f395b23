"""Runs on the pretended device."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from tests.device import life
from tests.material import Workshop, make_pairs
from trainer.config import Config, dump_config
from trainer.run import layout
from trainer.store.store import Store, open_store

STEPS, LAYERS = 3, 4


class Case(NamedTuple):
    """A run on so many ranks under a policy for GPUs, with `more` settings in that."""

    ranks: int = 2
    policy: str = "zero3"
    overrides: tuple[str, ...] = ()
    more: tuple[tuple[str, Any], ...] = ()
    base: str = "llama"
    ranks_per_node: int | None = None


_OFFLOADED = ("train.activation_offload=true", "train.activation_checkpointing=all", "quant.double=true")
STREAMS, ALONE = Case(), Case(1, "single_gpu")
OFFLOADED_ALONE = Case(1, "single_gpu", _OFFLOADED)
# Each node has the whole base there, and shares with the other what learns: two groups, whose collectives are in no
# order with each other.
NODES = Case(overrides=("sharding.scope=node",), ranks_per_node=1)
CASES = {
    2: {
        "streams": STREAMS,
        "no streams": Case(more=(("overlap_comm", False),)),
        "offloaded": Case(policy="zero3_offload_cpu", overrides=_OFFLOADED),
        "optimizer": Case(policy="zero3_offload_optimizer"),
        "tiled": Case(overrides=("train.tiled_mlp=true", "tuning.dropout=0.1")),
        "experts": Case(overrides=("tuning.experts=true", "tuning.experts_rank=3"), base="mixtral"),
        "pairs": Case(
            overrides=("objective.name=dpo", "data.format=preference", "eval.every=2", "optim.name=adamw_8bit")
        ),
    },
    1: {
        "alone": Case(1, "single_gpu", ("train.sample_every=3", "eval.max_tokens=4")),
        "offloaded alone": Case(1, "zero3_offload_cpu", _OFFLOADED),
    },
}


def made(device: Workshop, name: str, case: Case, *overrides: str) -> Config:
    """The configuration of a run of a case."""
    file = life.make_policy(device.folder / f"{name}.json", case.policy, **dict(case.more))
    settings = (f"train.steps={STEPS}", "checkpoint.every_steps=3", f"sharding.deepspeed={file}")
    given = device.config(name.replace(" ", "-"), *settings, *case.overrides, *overrides)
    run_of(given).put(layout.CONFIG, dump_config(given).encode())  # as the launcher does, for exports
    return given


def run_of(config: Config) -> Store:
    return open_store(config.run.store).sub(config.run.name)


def rows_of(folder: Path, name: str) -> tuple[str, ...]:
    """Settings that name rows which a case needs."""
    if name == "pairs":
        learnt, others = (make_pairs(folder / f"{seed}.jsonl", 16, seed) for seed in (6, 7))
        return f'data.train=[{{"path": "{learnt}"}}]', f'data.eval=[{{"path": "{others}"}}]'
    if name == "alone":
        (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "the ant? "}) + "\n")
        return (f"eval.prompts={folder / 'prompts.jsonl'}",)
    return ()
