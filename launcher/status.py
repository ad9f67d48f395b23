"""What a run is doing, from its folder alone: no scheduler, no Ray, and it works as well when the run's machines are gone.

The record is `metrics/<generation>.jsonl`, one file a start of the run and one JSON object a line. A later generation
goes on from a committed checkpoint, so its steps replace equal and later ones of the generations before it.
"""

import difflib
import json
import os
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from trainer import run_layout
from trainer.errors import ConfigError, NotFound, StorageError
from trainer.store import Entry, Store, open_store

Record = dict[str, Any]
State = Literal["starting", "running", "restarting", "silent", "finished", "stopped", "failed"]

ENDED: tuple[State, ...] = ("finished", "stopped", "failed")
SILENT_SECONDS = 120.0
_RATE_STEPS = 10
_NO_END = "killed or lost: it ended without a word"


@dataclass(frozen=True)
class Restart:
    """One start of the run after the first: from which step, and why the generation before it ended."""

    generation: int
    step: int | None
    reason: str


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment. Losses are in nats per target token, times in seconds; None is what is not known yet.

    `machines` has the ranks on each; `quiet_seconds` is the time since the newest sign of life; `reason` is why the newest
    generation ended. `start_seconds` has what the newest start took: `launch` (processes and imports), `load` (the base),
    `restore` (a checkpoint), and `first_step`, all of it until the first update was done.
    """

    run: str
    state: State
    generation: int = 0
    restarts: list[Restart] = field(default_factory=list)
    world_size: int | None = None
    machines: dict[str, int] = field(default_factory=dict)
    dashboard: str | None = None
    start_seconds: dict[str, float] = field(default_factory=dict)
    step: int = 0
    total_steps: int | None = None
    loss_first: float | None = None
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    last_commit_step: int | None = None
    last_commit_age_seconds: float | None = None
    quiet_seconds: float | None = None
    failed_saves: int = 0
    skipped_saves: int = 0
    stop_requested: bool = False
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, under the names above."""
        return asdict(self)


def find_run(run: str, store: str) -> Store:
    """The folder of `run`, a name in `store`, or a full URI or path.

    Raises `ConfigError`, naming the runs there are, when there is no such run.
    """
    parent, _, name = run.rstrip("/").rpartition("/") if "/" in run else (store, "", run)
    root = open_store(parent)
    folder = root.sub(name)
    if name and folder.exists(run_layout.CONFIG):
        return folder
    names = runs(root)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"there is no run {name!r} in {root.uri}.{hint} Runs there: {', '.join(names) or 'none'}.")


def runs(store: Store) -> list[str]:
    """Names of the runs in `store`, sorted."""
    return [name for name in store.folders() if store.exists(f"{name}/{run_layout.CONFIG}")]


def read_status(run: Store, clock: Callable[[], float] = time.time) -> RunStatus:
    """The run now. `clock` gives seconds since 1970. A folder with nothing in it is a run that is starting."""
    return Follower(run, clock).read()


def read_generation(run: Store, generation: int) -> dict[str, list[Record]]:
    """The records of one start of the run by their kind, in the order they were written."""
    records = _Generation()
    with suppress(NotFound):
        records.add(run.get(run_layout.metrics(generation)))
    return records.by_kind


def request_stop(run: Store, by: str | None = None) -> None:
    """Ask the run to commit a checkpoint and end. `by` says who asks; the default names this process and host."""
    request = {"time": time.time(), "by": by or f"process {os.getpid()} on {socket.gethostname()}"}
    run.put(run_layout.STOP, json.dumps(request).encode())


def request_restart(run: Store, reason: str) -> None:
    """Ask the ranks to commit a checkpoint and end, so that the driver starts them again; `reason` completes "stopped"."""
    run.put(run_layout.RESTART, json.dumps({"time": time.time(), "reason": reason}).encode())


def stop_requester(run: Store) -> str | None:
    """Who has asked the run to stop; None when nobody has."""
    with suppress(NotFound):
        return json.loads(run.get(run_layout.STOP))["by"]
    return None


class _Generation:
    """The records of one generation, parsed as they come in."""

    def __init__(self) -> None:
        self.by_kind: dict[str, list[Record]] = defaultdict(list)
        self.last_time: float | None = None
        self._tail = b""

    def add(self, data: bytes) -> None:
        """`data` may end in the middle of a line, which the next call completes."""
        *lines, self._tail = (self._tail + data).split(b"\n")
        for line in lines:
            try:
                record = json.loads(line)
                self.by_kind[record["kind"]].append(record)
            except (ValueError, KeyError, TypeError):
                continue  # torn by a crash of the machine that wrote it
            self.last_time = record.get("time", self.last_time)

    def last(self, kind: str) -> Record | None:
        return self.by_kind[kind][-1] if self.by_kind[kind] else None

    @property
    def start_step(self) -> int | None:
        start = self.last("start")
        return start["step"] if start else None


class Appended:
    """Reads of a growing object only what was appended since the last look."""

    def __init__(self, run: Store, key: str) -> None:
        self._run, self._key = run, key
        self._offset = 0

    def read(self, size: int) -> bytes:
        """Up to `size`, the object's length in bytes as of a listing. A shorter one than before holds nothing new."""
        data = bytes(self._run.get_range(self._key, self._offset, max(size, self._offset)))
        self._offset += len(data)
        return data


class Follower:
    """Reads a run's status again and again, each time only what is new."""

    def __init__(self, run: Store, clock: Callable[[], float] = time.time) -> None:
        self._run, self._clock = run, clock
        self._generations: dict[int, _Generation] = {}
        self._files: dict[int, Appended] = {}

    def read(self) -> RunStatus:
        files = self._read_metrics()
        if not self._generations:
            return RunStatus(self._run.uri, "starting", stop_requested=self._run.exists(run_layout.STOP))
        number = max(self._generations)
        newest = self._generations[number]
        now = self._clock()
        quiet = max(0.0, now - (newest.last_time or files[number].modified.timestamp()))
        step, total = self._step(), self._newest_value("start", "total_steps")
        tokens_per_second, step_seconds = _rates(newest)
        commit = self._last_commit()
        end = newest.last("end")
        return RunStatus(
            run=self._run.uri,
            state=_state(newest, quiet),
            generation=number,
            restarts=self._restarts(),
            world_size=self._newest_value("start", "world_size"),
            machines=dict(Counter(self._newest_value("start", "machines") or ())),
            dashboard=self._newest_value("start", "dashboard"),
            start_seconds=_start_seconds(newest),
            step=step,
            total_steps=total,
            loss_first=self._first_loss(),
            loss=self._newest_value("step", "loss"),
            eval_loss=self._newest_value("eval", "loss"),
            tokens_per_second=tokens_per_second,
            eta_seconds=None if end or total is None or step_seconds is None else (total - step) * step_seconds,
            last_commit_step=commit[0] if commit else None,
            last_commit_age_seconds=max(0.0, now - commit[1]) if commit else None,
            quiet_seconds=quiet,
            failed_saves=self._count("save_failed"),
            skipped_saves=self._count("save_skipped"),
            stop_requested=self._run.exists(run_layout.STOP),
            reason=end["reason"] if end else "",
        )

    def _read_metrics(self) -> dict[int, Entry]:
        files = {run_layout.generation_of(entry.key): entry for entry in self._run.list(run_layout.METRICS)}
        found = {number: entry for number, entry in sorted(files.items(), key=lambda item: item[0] or 0) if number}
        for number, entry in found.items():
            file = self._files.setdefault(number, Appended(self._run, entry.key))
            self._generations.setdefault(number, _Generation()).add(file.read(entry.size))
        return found

    def _newest_first(self) -> list[_Generation]:
        return [self._generations[number] for number in sorted(self._generations, reverse=True)]

    def _newest_value(self, kind: str, name: str) -> Any:
        """Of the newest generation that has written a record of this kind: one just restarted has no loss yet."""
        return next((record.get(name) for records in self._newest_first() if (record := records.last(kind))), None)

    def _count(self, kind: str) -> int:
        """Records of this kind in all generations."""
        return sum(len(records.by_kind[kind]) for records in self._generations.values())

    def _step(self) -> int:
        for records in self._newest_first():
            if step := records.last("step"):
                return step["step"]
            if records.start_step is not None:
                return records.start_step
        return 0

    def _first_loss(self) -> float | None:
        """The loss of the lowest step, by the newest generation that took it."""
        firsts = [records.by_kind["step"][0] for records in self._newest_first() if records.last("step")]
        return min(firsts, key=lambda record: record["step"])["loss"] if firsts else None

    def _restarts(self) -> list[Restart]:
        numbers = sorted(self._generations)
        restarts = []
        for before, number in zip(numbers[:-1], numbers[1:], strict=True):
            end = self._generations[before].last("end")
            reason = (end["reason"] or end["outcome"]) if end else _NO_END
            restarts.append(Restart(number, self._generations[number].start_step, reason))
        return restarts

    def _last_commit(self) -> tuple[int, float] | None:
        """(step, seconds since 1970) of the newest manifest: what is in the store, whatever the metrics say."""
        entries = self._run.list(run_layout.CHECKPOINTS)
        commits = ((run_layout.manifest_step(entry.key), entry.modified.timestamp()) for entry in entries)
        return max(((step, when) for step, when in commits if step is not None), default=None)


def _state(newest: _Generation, quiet: float) -> State:
    end = newest.last("end")
    if newest.last("restart"):
        return "restarting" if quiet < SILENT_SECONDS else "silent"
    if end:
        return end["outcome"]
    if newest.last("start") is None:
        return "starting"  # a large base takes minutes to load, without a line
    if quiet >= SILENT_SECONDS:
        return "silent"
    return "running" if newest.last("step") else "starting"


def _start_seconds(records: _Generation) -> dict[str, float]:
    start, first = records.last("start") or {}, records.last("first_step")
    parts = {part: start[f"{part}_seconds"] for part in ("launch", "load", "restore") if f"{part}_seconds" in start}
    return parts | ({"first_step": first["seconds"]} if first else {})


def _rates(records: _Generation) -> tuple[float | None, float | None]:
    """(tokens per second, seconds per step) over the last steps; None before the first."""
    recent = list(islice(reversed(records.by_kind["step"]), _RATE_STEPS))
    seconds = sum(record["seconds"] for record in recent)
    if not seconds:
        return None, None
    return sum(record["tokens"] for record in recent) / seconds, seconds / len(recent)


# --- for people


def render(status: RunStatus) -> RenderableType:
    """A small table of what is known."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, text in _lines(status):
        if text:
            table.add_row(name, text)
    return table


_COLORS: dict[State, str] = {"finished": "green", "running": "green", "failed": "red", "silent": "yellow"}


def _lines(status: RunStatus) -> Iterator[tuple[str, str]]:
    yield "run", status.run
    color = _COLORS.get(status.state)
    state = f"[{color}]{status.state}[/]" if color else status.state
    if status.state not in ENDED and status.quiet_seconds is not None and status.quiet_seconds >= SILENT_SECONDS:
        state += f", nothing written for {duration(status.quiet_seconds)}"
    yield "state", state + (", asked to stop" if status.stop_requested and status.state not in ENDED else "")
    yield "reason", _escaped(status.reason)
    yield "step", f"{status.step:,}" + (f" of {status.total_steps:,}" if status.total_steps is not None else "")
    yield "loss", _loss_line(status)
    if status.tokens_per_second is not None:
        eta = f", {duration(status.eta_seconds)} left" if status.eta_seconds is not None else ""
        yield "speed", f"{status.tokens_per_second:,.0f} tokens/s{eta}"
    yield "ranks", "" if status.world_size is None else _ranks_line(status)
    yield "dashboard", status.dashboard or ""
    yield "started", _start_line(status)
    if status.last_commit_step is not None:
        age = duration(status.last_commit_age_seconds or 0.0)
        yield "checkpoint", f"step {status.last_commit_step:,}, {age} ago"
    else:
        yield "checkpoint", "none committed"
    lost = ((status.failed_saves, "failed"), (status.skipped_saves, "skipped"))
    yield "saves", ", ".join(f"{count:,} {what}" for count, what in lost if count)
    for restart in status.restarts:
        where = "" if restart.step is None else f" at step {restart.step:,}"
        yield f"start {restart.generation}", _escaped(f"went on{where} after: {restart.reason}")


def _ranks_line(status: RunStatus) -> str:
    by_machine = ", ".join(f"{name}: {ranks}" for name, ranks in status.machines.items())
    return f"{status.world_size}" + (f" ({by_machine})" if by_machine else "")


def _start_line(status: RunStatus) -> str:
    parts = dict(status.start_seconds)
    if "first_step" not in parts:
        return ""
    total = parts.pop("first_step")
    return f"{total:.1f} s to the first step ({', '.join(f'{part} {took:.1f} s' for part, took in parts.items())})"


def _loss_line(status: RunStatus) -> str:
    if status.loss is None or status.loss_first is None:
        return ""
    evaluated = f", held out {status.eval_loss:.4f}" if status.eval_loss is not None else ""
    return f"{status.loss:.4f} nats (first {status.loss_first:.4f}){evaluated}"


def _escaped(text: str) -> str:
    """Without rich's markup: an error message may hold [brackets]."""
    return text.replace("[", r"\[")


def duration(seconds: float) -> str:
    """Two units: 45 s, 12 min 5 s, 3 h 20 min, 2 d 4 h."""
    whole = round(seconds)
    for size, unit, smaller, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {small_unit}"
    return f"{whole} s"


def watch(
    run: Store,
    stop: Callable[[], bool],
    *,
    console: Console | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> RunStatus:
    """Show the run's progress on stderr until `stop()` is true; returns the status it saw last."""
    follower = Follower(run)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:,}/{task.fields[total_steps]}"),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, console=console or Console(stderr=True)) as progress:
        task = progress.add_task("starting", total=None, total_steps="?", facts="")
        status = RunStatus(run.uri, "starting")
        while True:
            last_look = stop()
            try:
                status = follower.read()
                facts = _facts(status)
            except StorageError:
                # The run has its own patience with the store; the view of it must not end first.
                facts = "the store does not answer"
            progress.update(
                task,
                description=status.state,
                completed=status.step,
                total=status.total_steps,
                total_steps="?" if status.total_steps is None else f"{status.total_steps:,}",
                facts=facts,
            )
            if last_look:
                return status
            wait(poll_seconds(run))


def watch_table(
    run: Store,
    over: Callable[[], bool] | None = None,
    *,
    console: Console | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> RunStatus:
    """Show all that is known, again and again, until the run has ended, or `over()`; returns the status it saw last."""
    follower, ended = Follower(run), 0
    with Live(console=console or Console(stderr=True), auto_refresh=False) as live:
        while True:
            try:
                status = follower.read()
            except StorageError:
                wait(poll_seconds(run))  # the run has its own patience with the store; the view must not end first
                continue
            live.update(render(status), refresh=True)
            ended = ended + 1 if status.state in ENDED else 0
            if over() if over else ended == 2:  # between an end and a restart there is a moment
                return status
            wait(poll_seconds(run))


def _facts(status: RunStatus) -> str:
    parts = []
    if status.loss is not None:
        parts.append(f"loss {status.loss:.4f}")
    if status.tokens_per_second is not None:
        parts.append(f"{status.tokens_per_second:,.0f} tokens/s")
    if status.eta_seconds is not None:
        parts.append(f"{duration(status.eta_seconds)} left")
    if status.last_commit_step is not None:
        parts.append(f"committed {status.last_commit_step:,}")
    if status.restarts:
        parts.append(f"start {status.generation}")
    return " · ".join(parts)


def poll_seconds(run: Store) -> float:
    """A bucket bills each listing; a folder does not."""
    return 0.5 if run.uri.startswith(("file://", "memory://")) else 5.0
