"""Records of runs that never were, for those who read them."""

import json
import os
from pathlib import Path
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
    times = [time for record in records if isinstance(time := _time(record), int | float) and time < 2**40]
    if times:
        stamp(run, layout.metrics(generation), times[-1])


def _time(record: Any) -> Any:
    """What a record, which may be damaged, says of its time."""
    return record.get("time") if isinstance(record, dict) else None


def stamp(run: Store, key: str, time: float) -> None:
    """Have the object written at this time, in seconds since 1970, by the clock of the store."""
    os.utime(Path(run.uri.removeprefix("file://")) / key, (time, time))
