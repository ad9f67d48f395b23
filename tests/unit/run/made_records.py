"""Records of runs that never were, for those who read them."""

import json
from typing import Any

from trainer.run import layout
from trainer.store.store import Store

NOW = 1_800_000_000.0
CONFIG = """
run: {name: demo}
model: {base: base}
data: {train: [{path: train.jsonl}]}
train: {steps: 20}
"""


def start(generation: int, step: int = 0, world_size: int = 2) -> dict[str, Any]:
    facts = {"generation": generation, "world_size": world_size, "step": step, "total_steps": 20}
    return {"kind": "start", **facts, "host": "node1", "device": "cpu", "time": NOW}


def step(number: int, loss: float, time: float = NOW) -> dict[str, Any]:
    rates = {"tokens": 1000, "targets": 900, "seconds": 2.0, "tokens_per_second": 500.0}
    return {"kind": "step", "step": number, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, **rates, "time": time}


def end(outcome: str, reason: str = "") -> dict[str, Any]:
    return {"kind": "end", "outcome": outcome, "step": None, "reason": reason, "time": NOW}


def write(run: Store, generation: int, *records: dict[str, Any], torn: bytes = b"") -> None:
    lines = "".join(json.dumps(record) + "\n" for record in records)
    run.put(layout.metrics(generation), lines.encode() + torn)
