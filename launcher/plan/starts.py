"""How long a start of a run takes by its phases, and which share of the run's cost its restarts are.

The phases are those of a start that the store knows, if one from this base was on about as many ranks. Each other phase
is estimated, and says what that rests on.
"""

import hashlib
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from rich.filesize import decimal

from launcher.view.runs import runs
from trainer.base.find.locate import AtHand, on_the_hub
from trainer.config import Config
from trainer.config.paths import users_folder
from trainer.config.run import Checkpoint
from trainer.errors import CapstanError, ConfigError, counted
from trainer.plan.forecast import NETWORK
from trainer.plan.inputs import held_size, stored_size
from trainer.plan.needs import Plan
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

# A start on up to so many times as many ranks, or as few, takes about the same time.
_ALIKE = 2
# A load of fewer bytes measures no rate.
_ENOUGH_BYTES = 10**9
# Seconds of a rank's imports and of Ray's own processes, as benchmarks/README.md has them for an idle machine.
_IMPORTS, _RAY = 6.1, 9.0
# Seconds a rank for the meeting and for making groups, as 1,024 ranks of one busy machine took.
_MEET, _GROUPS = 0.0016, 0.005
# Bytes a second that a node reads from a store through a card of 25 Gb/s, and that a rank quantizes on a CPU.
_NODE_READS, _CPU_QUANTIZES = 2.5e9, 0.075e9
# A GET has so many bytes, and a prefix of S3 answers so many of them a second.
_GET_BYTES, _GETS = 4 * 2**20, 5500
# Seconds for kernels that are compiled and for the first connections between ranks.
_WARMS_UP = {"gpu": 30.0, "cpu": 2.0}


class Phase(NamedTuple):
    """The seconds of one phase of a start, and what they rest on. `assumed` names what of this nothing has measured."""

    seconds: float
    basis: str
    assumed: bool = True


@dataclass(frozen=True)
class StartTime:
    """The phases of a start on so many `ranks`. `run` is the run of the store whose start has them, if there is one."""

    phases: dict[str, Phase]
    ranks: int
    run: str | None = None

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases.values())

    def to_json(self) -> dict[str, Any]:
        phases = {name: phase._asdict() for name, phase in self.phases.items()}
        return {"seconds": self.seconds, "phases": phases, "ranks": self.ranks, "run": self.run}


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


@dataclass(frozen=True)
class KnownStart:
    """A start that the store knows: the seconds of its parts, and the bytes a second that each of its ranks read.

    `same_base` says whether the load was that of the planned run's base.
    """

    run: str
    time: float
    ranks: int
    seconds: dict[str, float]
    same_base: bool
    read_bytes: int
    load_rate: float


def past_starts(store: Store, config: Config) -> list[KnownStart]:
    """Return the newest starts of each run whose base lies in the same place as that of `config`."""
    with suppress(CapstanError), ThreadPoolExecutor(_RUNS_AT_A_TIME) as pool:
        return [
            one for of_run in pool.map(lambda name: _starts(store.sub(name), config), runs(store)) for one in of_run
        ]
    return []


def _base(config: Config) -> tuple[object, ...]:
    return config.model.base, config.model.layers, config.quant.type, config.sharding.scope


def _place(config: Config) -> str:
    """Return the bucket that the base is in, or "" if it comes from a folder."""
    return "/".join(config.model.base.split("/")[:3]) if _in_cloud(config.model.base) else ""


def _in_cloud(uri: str) -> bool:
    return uri.startswith(("s3://", "gs://", "az://"))


def _starts(folder: Store, config: Config) -> list[KnownStart]:
    found = list[KnownStart]()
    with suppress(CapstanError):
        other = run_config(folder)
        if _place(other) != _place(config):
            return []
        every = streams(folder.list(layout.METRICS))
        for number in starts_in(every)[-_STARTS:]:
            records = {record["kind"]: record for record in reversed(edge_records(folder, number, every, _EDGE_BYTES))}
            if "start" in records and "first_step" in records:
                same = _base(other) == _base(config)
                found.append(_past(name_of(folder), records["start"], records["first_step"], same))
    return found


def _past(run: str, start: Record, first: Record, same_base: bool) -> KnownStart:
    seconds = {part: start[f"{part}_seconds"] for part in PARTS if start.get(f"{part}_seconds") is not None}
    seconds["first_step"] = max(0.0, first["seconds"] - sum(seconds.values()))
    ranks, read = start.get("world_size") or 1, int(start.get("read_bytes") or 0)
    rate = read / seconds["load"] / ranks if seconds.get("load") else 0.0
    return KnownStart(run, start.get("time", 0.0), ranks, seconds, same_base, read, rate)


def start_time(
    past: Iterable[KnownStart], estimate: Callable[[KnownStart | None], dict[str, Phase]], world_size: int
) -> StartTime:
    """Return the time of a start on so many ranks.

    It is that of the newest start from the same base on about as many ranks, if there is one. Otherwise `estimate`
    makes phases, from the newest start whose load measures how fast the base's place answers. Parts of a start that do
    not grow with the ranks are those of the start that is nearest.
    """
    nearest = sorted(past, key=lambda one: (-abs(one.ranks - world_size), one.time), reverse=True)
    same = [one for one in nearest if one.same_base]
    if same and max(same[0].ranks, world_size) <= _ALIKE * min(same[0].ranks, world_size):
        return StartTime(_measured(same[0]), same[0].ranks, same[0].run)
    reading = [one for one in nearest if one.read_bytes >= _ENOUGH_BYTES]
    phases = estimate(reading[0] if reading else None)
    if same:
        alone = _measured(same[0])
        phases |= {name: alone[name] for name in ("launch", "restore", "first_step") if name in alone}
    elif nearest:
        phases |= {name: phase for name, phase in _measured(nearest[0]).items() if name == "launch"}
    return StartTime(phases, world_size)


def _measured(past: KnownStart) -> dict[str, Phase]:
    basis = f"as {past.run} took on {counted(past.ranks, 'rank')}"
    return {name: Phase(seconds, basis, assumed=False) for name, seconds in past.seconds.items()}


def estimated_phases(
    config: Config,
    at_hand: AtHand,
    plan: Plan,
    per_node: int,
    step_seconds: float | None,
    store_rate: float | None,
    past: KnownStart | None,
) -> dict[str, Phase]:
    """Return what each phase of a start would take, on nodes of `per_node` ranks.

    `store_rate` is how many bytes a second the base's place gives to all ranks, if that is known, and `past` a start
    that has read from there. `step_seconds` is the time of a later step, if that is known.
    """
    ranks = plan.batch.world_size
    nodes = ceil(ranks / per_node)
    phases = {"launch": _launch(nodes), "meet": _at_each_rank(_MEET, ranks)}
    if nodes > 1 and plan.scope == "node":
        phases["groups"] = _at_each_rank(_GROUPS, ranks)
    phases["load"] = _load(config, at_hand, plan, nodes, per_node, store_rate, past)
    warms_up = _WARMS_UP[plan.device]
    basis = f"{warms_up:g} s for kernels and first connections (assumed)"
    if step_seconds is not None:
        basis += f" and a step of {step_seconds:.3g} s"
    phases["first_step"] = Phase(warms_up + (step_seconds or 0.0), basis)
    return phases


def keep_import_seconds(seconds: float) -> None:
    """Keep what the imports of a rank took in this environment on this machine, for later plans."""
    with suppress(OSError, ConfigError):  # a home folder that cannot be written costs only the better figure
        (kept := _kept_at()).parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(f"{seconds:.3f}")


def _kept_import_seconds() -> float | None:
    with suppress(OSError, ConfigError, ValueError):
        return float(_kept_at().read_text())
    return None


def _kept_at() -> Path:
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:16]
    return users_folder("XDG_STATE_HOME", ".local/state") / "imports" / environment


def _launch(nodes: int) -> Phase:
    kept = _kept_import_seconds()
    seconds = _IMPORTS if kept is None else kept
    basis = f"imports {seconds:.1f} s ({'assumed' if kept is None else 'as capstan doctor measured them here'})"
    if nodes == 1:
        return Phase(seconds, basis, assumed=kept is None)
    return Phase(seconds + _RAY, f"{basis}, and {_RAY:g} s for Ray's processes (assumed)")


def _at_each_rank(seconds: float, ranks: int) -> Phase:
    return Phase(seconds * ranks, f"{1000 * seconds:g} ms a rank (assumed)")


def _load(
    config: Config,
    at_hand: AtHand,
    plan: Plan,
    nodes: int,
    per_node: int,
    store_rate: float | None,
    past: KnownStart | None,
) -> Phase:
    ranks, known = plan.batch.world_size, at_hand.description.architecture
    stored, held = stored_size(config, known, at_hand.directory), held_size(config, known)
    size, what = (held, "the cache of quantized shards") if config.quant.cache else (stored, "the base")
    if store_rate:
        rate, source = store_rate, f"{decimal(int(store_rate))}/s (--store-rate)"
    elif past:
        rate = past.load_rate * ranks
        source = f"{decimal(int(past.load_rate))}/s a rank, as {past.run} read on {counted(past.ranks, 'rank')}"
    else:
        rate, source = _NODE_READS * nodes, f"{decimal(int(_NODE_READS))}/s a node (assumed)"
    seconds, words = size / rate, f"{decimal(size)} of {what}, read once, at {source}"
    if not config.quant.cache and on_the_hub(config.model.base):
        words += ", after its download from the Hub"
    if _in_cloud(config.run.store if config.quant.cache else config.model.base):
        gets = ceil(size / _GET_BYTES)
        seconds += gets / _GETS
        words += f"; {gets:,} requests at {_GETS:,} a second, as a prefix of S3 takes (assumed)"
    if plan.device == "cpu" and held < size and not past:
        seconds += size / (_CPU_QUANTIZES * ranks)
        words += f"; quantized at {decimal(int(_CPU_QUANTIZES))}/s a rank (assumed)"
    if plan.scope == "node" and nodes > 1 and plan.device == "gpu":
        seconds += held / (NETWORK * per_node)
        words += f"; {decimal(held)} exchanged between nodes at {decimal(int(NETWORK))}/s a GPU (assumed)"
    return Phase(seconds, words, assumed=not (store_rate or past) or "(assumed)" in words)


def restarts(
    start: StartTime, ranks: int, step_seconds: float, seconds: float, rules: Checkpoint, gpu_hours: float
) -> Restarts:
    """Return what restarts cost a run of so many `seconds` on so many ranks, with a failure every `gpu_hours`."""
    between = [every for every in (rules.every_steps * step_seconds, 60 * rules.every_minutes) if every]
    each = start.seconds + min([*between, seconds]) / 2
    rate = ranks / (3600 * gpu_hours)  # failures a second
    lost = rate * each
    return Restarts(gpu_hours, rate * seconds, each, lost / (1 + lost))
