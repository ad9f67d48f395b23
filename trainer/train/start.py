"""One start of a run, as one of its ranks sees it, from its claim to its end.

Starter        what only the program knows that started the ranks
ClaimedStart   the settings, the ranks and the place in the run's folder, with the start's number
Start          the same once it writes records, hears requests and shows that it is alive (`opened`)
begin_from     the adapter that the run begins from, in what learns
record_...     what the start is, what was planned for it, which settings are new
early_end      why it ended before the last step, `last_words` where some rank hangs
"""

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch

from trainer.base.load.load import LoadReport
from trainer.base.partitions.filling import SOURCE_DTYPES
from trainer.config import Config
from trainer.errors import (
    CapstanError,
    DoesNotFit,
    MachineLeaves,
    NonFiniteLoss,
    SlowMachine,
    Stopped,
    StorageError,
    counted,
)
from trainer.export.write.checkpoint_adapters import adapters_beside
from trainer.plan.beginning import Beginning
from trainer.plan.plan import make_plan
from trainer.plan.resolve import Resolved
from trainer.processes.ranks import Ranks, Team
from trainer.run.background import Harmless
from trainer.run.folder import record_settings
from trainer.run.lines import end_sentence
from trainer.run.log import rank_log, tell
from trainer.run.metrics import Metrics, open_trackers
from trainer.run.records import add_record
from trainer.run.requests import StopSignal
from trainer.run.segments import store_tail
from trainer.state.kept import Kept
from trainer.state.zero.engine import Engine
from trainer.store.store import Store
from trainer.train.heartbeat import Hang, Heart, Pulse, silent_pulse
from trainer.tuning.objective import Objective


@dataclass(frozen=True)
class Starter:
    """The values that only the program which started the ranks knows.

    Attributes:
        facts: for the start's record.
        machine: the name of this machine.
        preempted: tells whether a machine of the run is about to leave.
        observe: gets the record of each step on rank 0.
        began: when the start did, in seconds since 1970.
        kept: memory of this machine in which the rank before this one has left what it knew.
    """

    facts: Mapping[str, str] = field(default_factory=dict)
    machine: str = field(default_factory=socket.gethostname)
    preempted: Callable[[], bool] = lambda: False
    observe: Callable[[Mapping[str, float]], None] = lambda record: None
    began: float = field(default_factory=time.time)
    kept: Kept | None = None


class Elapsed:
    """Seconds since a start began, which was in another process and perhaps on another machine, from a time in seconds
    since 1970.

    This process measures its own part by a clock that is never set.
    """

    def __init__(self, began: float) -> None:
        self._entered = time.monotonic()
        self.launch_seconds = max(0.0, time.time() - began)
        self.meet_seconds = 0.0

    def met(self) -> None:
        """All ranks have come together."""
        self.meet_seconds = time.monotonic() - self._entered

    @property
    def seconds(self) -> float:
        return round(self.launch_seconds + time.monotonic() - self._entered, 3)


@dataclass(frozen=True)
class ClaimedStart:
    """A start of the run that has its number, on this rank. `folder` is the run's own in the `store`, which also holds
    its data.
    """

    resolved: Resolved
    ranks: Team
    store: Store
    folder: Store
    generation: int
    starter: Starter = field(default_factory=Starter)
    elapsed: Elapsed = field(default_factory=lambda: Elapsed(time.time()))

    @property
    def config(self) -> Config:
        return self.resolved.config

    @property
    def objective(self) -> Objective:
        return self.resolved.objective

    def log(self, text: str) -> None:
        """Write a line to the run's log, which is rank 0's."""
        if self.ranks.rank == 0:
            tell(text)


@dataclass(frozen=True, kw_only=True)
class Start(ClaimedStart):
    """A start that can also write records, hears requests to stop, shows that it is alive, and has adapters written
    after commits. If some rank hangs, `let_last_words` does not return: this process is then about to be ended.
    """

    metrics: Metrics
    stop: StopSignal
    pulse: Pulse = silent_pulse
    after_commit: Callable[[], None] = lambda: None
    let_last_words: Callable[[], None] = lambda: None


@contextmanager
def opened(claimed: ClaimedStart) -> Iterator[Start]:
    """The start with its log, adapters, records, requests and heartbeat, nested so that each may still write to the
    earlier ones.
    """
    resolved, ranks, folder, generation = claimed.resolved, claimed.ranks, claimed.folder, claimed.generation
    config, first = claimed.config, ranks.rank == 0
    with (
        rank_log(folder, generation, ranks.rank, ranks.world_size, config.track.flush_seconds) as flush_log,
        # Its wait for the last adapter is not watched by the search for hanging ranks.
        adapters_beside(folder, resolved, tell, writes=first) as after_commit,
        ExitStack() as stack,
    ):
        tail = claimed.starter.kept.records if first and claimed.starter.kept else None
        if tail is not None:
            Harmless("storing the last records of a rank that was lost")(partial(store_tail, folder, tail))
        metrics = Metrics(open_trackers(folder, generation, config, tail) if first else ())
        stack.callback(metrics.close)
        metrics.write("phase", phase="load")
        seconds = min(5.0, config.track.flush_seconds)
        stop = StopSignal(folder, watches=first, seconds=seconds, preempted=claimed.starter.preempted)
        stack.callback(stop.close)
        stack.enter_context(stop.on_signals())
        heart = Heart(ranks.world, config.timeouts, last_words(folder, generation, metrics, flush_log))
        stack.callback(heart.close)
        yield Start(
            **vars(claimed),
            metrics=metrics,
            stop=stop,
            pulse=heart,
            after_commit=after_commit,
            let_last_words=heart.let_last_words,
        )


def begin_from(beginning: Beginning, start: Start, engine: Engine) -> None:
    """Fill the masters of `engine` from `tuning.start`. Collective.

    Raises:
        StorageError: the adapter cannot be read, or is damaged.
    """
    start.ranks.on_first(beginning.check)
    start.ranks.together(lambda: _fill(beginning, engine))
    engine.refresh(0)
    start.log(f"begins from the adapter of {beginning.facts['start']}")


def _fill(beginning: Beginning, engine: Engine) -> None:
    partitions = {part.name: part for part in engine.partitions()}
    ranges = {name: (part.begin, part.end) for name, part in partitions.items()}
    for name, begin, end, dtype, data in beginning.read(ranges):
        part = partitions[name]
        values = torch.frombuffer(bytearray(data), dtype=SOURCE_DTYPES[dtype])
        part.states["master"][begin - part.begin : end - part.begin].copy_(values)


def record_start(start: Start, report: LoadReport, **facts: Any) -> None:
    """Write what this start is, with these `facts`, and how long each part of it took. Collective."""
    ranks, starter, elapsed = start.ranks, start.starter, start.elapsed
    read_bytes = sum(read for (read,) in ranks.gather(report.read_bytes))
    of_rank = {
        "launch": elapsed.launch_seconds,
        "load": report.seconds,
        "restore": facts["restore_seconds"],
    }
    processes = ranks.gather_objects((socket.gethostname(), os.getpid(), starter.machine, of_rank))
    machines = [machine for _, _, machine, _ in processes]
    start.metrics.write(
        "start",
        generation=start.generation,
        world_size=ranks.world_size,
        sequence_parallel=start.config.sharding.sequence_parallel,
        **facts,
        host=processes[0][0],
        hosts=[host for host, _, _, _ in processes],
        pids=[pid for _, pid, _, _ in processes],
        machines=machines,
        slowest=slowest([seconds for _, _, _, seconds in processes], machines),
        device=ranks.device_name,
        launch_seconds=round(elapsed.launch_seconds, 3),
        meet_seconds=round(elapsed.meet_seconds, 3),
        load_seconds=round(report.seconds, 3),
        load_gigabytes_per_second=round(read_bytes / 1e9 / report.seconds, 3),
        read_bytes=int(read_bytes),
        kept_bytes=report.kept_bytes,
        kernels=report.kernels,
        start_seconds=elapsed.seconds,
        **starter.facts,
    )


def slowest(ranks: Sequence[Mapping[str, float]], machines: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The rank that took longest for each part of a start, and the median of all ranks, in seconds."""
    found = dict[str, dict[str, Any]]()
    for part in ranks[0]:
        seconds = [rank[part] for rank in ranks]
        last = seconds.index(max(seconds))
        middle = {"seconds": round(seconds[last], 3), "median": round(median(seconds), 3)}
        found[part] = {"rank": last, "machine": machines[last], **middle}
    return found


def record_plan(start: Start, settled: Resolved) -> None:
    """Write the plan for the `settled` settings on these ranks, to compare with what will be measured."""
    ranks = start.ranks
    plan = make_plan(
        settled.config, settled.base.description, ranks.world_size, ranks.ranks_per_node, ranks.device_memory
    )
    parts = (plan.parameters, plan.memory_per_gpu, plan.memory_per_host)
    names = ("parameters", "memory_per_gpu", "memory_per_host")
    start.metrics.write("plan", device=ranks.device.type, **dict(zip(names, map(asdict, parts), strict=True)))


def record_changes(start: Start) -> None:
    """Keep the settings of this start, on rank 0, and write which of them differ from the previous start's."""
    try:
        for change in record_settings(start.folder, start.generation, start.config):
            start.metrics.write("change", **change._asdict())
            start.log(change.sentence())
    except StorageError as error:  # a record never decides how a run ends
        start.log(f"the settings of this start could not be kept, which does not end the run: {error}")


@contextmanager
def early_end(start: Start) -> Iterator[None]:
    """Write the reason of an early end into the records and the rank's log, and raise it again.

    Where some rank hangs, that is the reason: an error in this thread only says that the others have ended.
    """
    metrics = start.metrics
    try:
        try:
            yield
        except Exception:
            start.let_last_words()
            raise
    except CapstanError as error:
        outcome = "stopped" if isinstance(error, Stopped) else "failed"
        _print(outcome, str(error))
        facts: dict[str, Any] = {"bad_window": error.window} if isinstance(error, NonFiniteLoss) else {}
        if isinstance(error, MachineLeaves):
            facts["lost_machine"] = True
        if isinstance(error, SlowMachine):
            facts["slow_ranks"] = error.ranks
        metrics.write("end", outcome=outcome, step=None, reason=str(error), **facts)
        raise
    except torch.OutOfMemoryError as error:
        traceback.print_exc()
        short = DoesNotFit(
            f"out of GPU memory ({str(error).splitlines()[0]}). {planned_memory(start.resolved, start.ranks)} Lower "
            "data.sequence_length or train.micro_batch, set train.activation_checkpointing: all, or use more ranks."
        )
        _print("failed", str(short))
        metrics.write("end", outcome="failed", step=None, reason=str(short))
        raise short from error
    except Exception as error:
        traceback.print_exc()
        metrics.write("end", outcome="failed", step=None, reason=f"{type(error).__name__}: {error}")
        raise


def _print(outcome: str, reason: str) -> None:
    print(end_sentence(outcome, reason), file=sys.stderr)


def planned_memory(resolved: Resolved, ranks: Ranks) -> str:
    """A sentence on the memory that `capstan plan` expects on one GPU: the total, and its three largest parts."""
    base = resolved.base.description
    plan = make_plan(resolved.config, base, ranks.world_size, ranks.ranks_per_node, ranks.device_memory)
    memory = asdict(plan.memory_per_gpu)
    total = memory.pop("total")
    largest = sorted(memory.items(), key=lambda part: -part[1])[:3]
    parts = ", ".join(f"{name.replace('_', ' ')} {size / 2**30:.1f} GiB" for name, size in largest)
    return f"The plan for {counted(ranks.world_size, 'rank')} is {total / 2**30:.1f} GiB a GPU: {parts}."


def last_words(
    folder: Store, generation: int, metrics: Metrics, flush_log: Callable[[], None]
) -> Callable[[Hang, bool], None]:
    """A function that writes a rank's log and end into the run's folder before the rank ends because some rank
    hangs.
    """

    def say(hang: Hang, mine: bool) -> None:
        flush_log()
        if not mine:
            return
        end = {"outcome": "failed", "step": None, "reason": hang.reason, "hung_ranks": hang.ranks}
        if 0 in hang.ranks:  # Then this rank is not rank 0, and rank 0 may never write again.
            with suppress(StorageError):
                add_record(folder, generation, "end", **end)
        metrics.write_through("end", **end)

    return say
