"""How long a start of a run takes, and which share of its cost its restarts are. Both by what the store knows."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from launcher.view.runs import runs
from trainer.config import Config
from trainer.config.run import Checkpoint
from trainer.errors import CapstanError
from trainer.run import layout
from trainer.run.folder import name_of, run_config
from trainer.run.records import PARTS, Record, edge_records, starts_in
from trainer.run.segments import streams
from trainer.store.store import Store

_EDGE_BYTES = 2**16
_RUNS_AT_A_TIME = 16
_STARTS = 4
"""So many of the newest starts of each run count."""
GPU_HOURS_BETWEEN_FAILURES = 50_000.0
"""The training of Llama 3 405B had 419 unexpected interruptions in 54 days on 16,384 GPUs (arXiv 2407.21783)."""


@dataclass(frozen=True)
class StartTime:
    """The seconds of each part of a start of `run` on so many `ranks`, and of the rest until its first update."""

    parts: dict[str, float]
    first_step: float
    run: str
    ranks: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values()) + self.first_step


@dataclass(frozen=True)
class Restarts:
    """The restarts that a run can expect, and what they cost.

    Each costs the time of a start and half of the time between two commits, on all GPUs. `share` is that of the cost of
    the whole run, and `count` how many of them come, for a failure every `gpu_hours` on average.
    """

    gpu_hours: float
    count: float
    seconds_each: float
    share: float


def start_time(store: Store, config: Config, world_size: int) -> StartTime | None:
    """Return the time of the start of a run with the same base on about as many ranks; None if the store has none."""
    with suppress(CapstanError), ThreadPoolExecutor(_RUNS_AT_A_TIME) as pool:
        found = pool.map(lambda name: _starts(store.sub(name), config), runs(store))
        every = [one for of_run in found for one in of_run]
        # The newest one on the number of ranks that is nearest.
        return max(every, key=lambda one: (-abs(one[1].ranks - world_size), one[0]), default=(0.0, None))[1]
    return None


def _base(config: Config) -> tuple[object, ...]:
    return config.model.base, config.model.layers, config.quant.type, config.sharding.scope


def _starts(folder: Store, config: Config) -> list[tuple[float, StartTime]]:
    """Return when the starts of a run began to train, and their times. A run with another base has none that count."""
    found = list[tuple[float, StartTime]]()
    with suppress(CapstanError):
        if _base(run_config(folder)) != _base(config):
            return []
        every = streams(folder.list(layout.METRICS))
        for number in starts_in(every)[-_STARTS:]:
            records = {record["kind"]: record for record in reversed(edge_records(folder, number, every, _EDGE_BYTES))}
            if "start" in records and "first_step" in records:
                found.append(_time_of(name_of(folder), records["start"], records["first_step"]))
    return found


def _time_of(run: str, start: Record, first: Record) -> tuple[float, StartTime]:
    parts = {part: start[f"{part}_seconds"] for part in PARTS if start.get(f"{part}_seconds") is not None}
    rest = max(0.0, first["seconds"] - sum(parts.values()))
    return start.get("time", 0.0), StartTime(parts, rest, run, start.get("world_size") or 1)


def restarts(
    start: StartTime, ranks: int, step_seconds: float, seconds: float, rules: Checkpoint, gpu_hours: float
) -> Restarts:
    """Return what restarts cost a run of so many `seconds` on so many ranks, with a failure every `gpu_hours`."""
    between = [every for every in (rules.every_steps * step_seconds, 60 * rules.every_minutes) if every]
    each = start.seconds + min([*between, seconds]) / 2
    rate = ranks / (3600 * gpu_hours)  # failures a second
    lost = rate * each
    return Restarts(gpu_hours, rate * seconds, each, lost / (1 + lost))
