"""The status of a run, from its folder alone: no scheduler, no Ray. It works even when the run's machines are gone.

A generation is one start of the run. Its records are in `metrics/` (trainer/run/records.py). A later generation goes on
from a committed checkpoint, so its steps replace equal and later ones of the generations before it.
"""

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

from trainer.base.describe.torch_answers import user_cache
from trainer.config import Config
from trainer.errors import ConfigError
from trainer.run import layout
from trainer.run.folder import command, run_config
from trainer.run.lines import wrong_sentence
from trainer.run.owner import Owner, StoreClock, last_owner, preparer, read_owner
from trainer.run.records import Lifetime, Record, RunReader, last_written, measures, read_records
from trainer.run.segments import Segment, streams
from trainer.state.checkpoint.manifest import newest_commit
from trainer.store.store import Store

_BLOCKS = "▁▂▃▄▅▆▇█"
_MOST_POINTS = 120


class Thinned:
    """At most so many points of a curve, evenly spread over its steps, however long it gets."""

    def __init__(self, most: int = _MOST_POINTS) -> None:
        self.points: list[tuple[int, float]] = []
        self._most, self._every = most, 1

    def add(self, step: int, value: float | None) -> None:
        """Add a point after those before it. A point that is not at a multiple of the distance is left out."""
        if value is None or step % self._every:
            return
        self.points.append((step, value))
        while len(self.points) > self._most:
            self._every *= 2
            self.points = [point for point in self.points if point[0] % self._every == 0]


def stretches(length: int, count: int) -> Iterator[tuple[int, int]]:
    """Return the begins and ends of `count` stretches of about the same length, which together are the whole."""
    return pairwise(length * number // count for number in range(count + 1))


_WIDTH = 40


def sparkline(points: Sequence[tuple[int, float]]) -> str:
    """Return the curve as blocks, lowest to highest; empty for less than two points.

    If there are more points than blocks, each block is the mean of its own.
    """
    if len(points) < 2:
        return ""
    columns = min(_WIDTH, len(points))
    parts = [[value for _, value in points[begin:end]] for begin, end in stretches(len(points), columns)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


T = TypeVar("T")
RunState = Literal["starting", "running", "restarting", "silent", "finished", "stopped", "failed"]

ENDED: tuple[RunState, ...] = ("finished", "stopped", "failed")
SILENT_SECONDS = 120.0
_RATE_STEPS = 10
_NEVER_BEGUN = "its start died before its first record, and nothing is lost; start it again from its configuration"
_LONGEST_LINE = 1000
_NEVER_BEGUN_AGAIN = "the start that was to go on with it died before its first record, and nothing is lost"
_NO_RECORDS = "its records are lost, and its checkpoints are not"
_NO_END = "killed or lost: it ended without a word"


@dataclass(frozen=True)
class Restart:
    """One start of the run after the first: from which step, and why the generation before it ended.

    `restored` is where the step was: checkpoint, memory (of the ranks' machines) or neighbour (of another one); None if
    the start has not trained. `died` is when a rank did, if a keeper has seen it, `noticed` when the end was
    recorded, and `back` when the first update after those of before was made, in seconds since 1970. `lost_seconds` lie
    between the death, or the last record before, and that. `again` updates were made again, and `read_bytes` of the
    base were read.
    """

    generation: int
    step: int | None
    reason: str
    restored: str | None = None
    died: float | None = None
    noticed: float | None = None
    back: float | None = None
    lost_seconds: float | None = None
    again: int = 0
    read_bytes: int | None = None


@dataclass(frozen=True)
class SlowRank:
    """A rank that takes `ratio` times as long as the others since `step`, its machine, and why if that is known."""

    step: int
    rank: int
    machine: str
    ratio: float | None
    why: str


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment. Losses are in nats, times in seconds. None is what is not known yet.

    `lost_seconds` and `again` are those of all `restarts`.
    `machines` has the ranks on each machine, `slow_ranks` those of the newest start that are slower than the
    others, and `sequence_parallel` ranks share each row. `wrong_bytes` has a sentence for each wrong byte that any
    start has found. `device` is what rank 0 computes on. `quiet_seconds` is
    the time since the newest sign of life. `reason` is why the newest generation ended. `start_seconds` has what
    the newest start took: `launch` (processes and imports), `meet` (until all ranks have come together), `load`
    (the base), `restore` (a checkpoint), and `first_step`, which is all of it until the first update was done.
    `start_slowest` has the parts in which one rank was late. `epoch` counts whole passes over the data, and
    `passes` also the part of the current one, of the requested `epochs`, if any. `loss_curve` has (step, loss) of
    evenly spread steps. `accuracy` and `eval_accuracy` are the shares that are right of what has a class, if the
    run learns classes. `eval_losses` has the newest loss of each named evaluation set, and `measured` the newest
    figures of each other action that has some. `gpu_hours` are those of all starts, and `cost` follows from
    track.price_per_gpu_hour. `next` is the command that an ended run suggests.
    """

    run: str
    state: RunState
    generation: int = 0
    restarts: list[Restart] = field(default_factory=list)
    lost_seconds: float = 0.0
    again: int = 0
    world_size: int | None = None
    sequence_parallel: int = 1
    machines: dict[str, int] = field(default_factory=dict)
    slow_ranks: list[SlowRank] = field(default_factory=list)
    wrong_bytes: list[str] = field(default_factory=list)
    device: str | None = None
    dashboard: str | None = None
    start_seconds: dict[str, float] = field(default_factory=dict)
    start_slowest: dict[str, dict[str, Any]] = field(default_factory=dict)
    step: int = 0
    total_steps: int | None = None
    epoch: int | None = None
    passes: float | None = None
    epochs: float | None = None
    lr: float | None = None
    loss_first: float | None = None
    loss: float | None = None
    loss_curve: list[tuple[int, float]] = field(default_factory=list)
    reward: float | None = None
    accuracy: float | None = None
    eval_loss: float | None = None
    eval_accuracy: float | None = None
    eval_losses: dict[str, float] = field(default_factory=dict)
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    last_commit_step: int | None = None
    last_commit_age_seconds: float | None = None
    quiet_seconds: float | None = None
    failed_saves: int = 0
    skipped_saves: int = 0
    stop_requested: bool = False
    reason: str = ""
    gpu_hours: float | None = None
    cost: float | None = None
    next: str = ""


def read_status(folder: Store, clock: Callable[[], float] | None = None) -> RunStatus:
    """Return the run's status now.

    `clock` gives seconds since 1970; by default it is the store's. A folder with nothing in it is a run that is
    starting.
    """
    return Follower(folder, clock).read()


def read_generation(folder: Store, generation: int) -> dict[str, list[Record]]:
    """Return the records of one start of the run by their kind, in the order in which they were written."""
    by_kind: dict[str, list[Record]] = defaultdict(list)
    for record in read_records(folder, generation):
        by_kind[record["kind"]].append(record)
    return by_kind


class Summary:
    """The part of one generation's records that a status needs. It stays small, however many records there are."""

    def __init__(self, reached: int = 0) -> None:
        self.reached, self.back = reached, None
        """The newest step of the starts before, and when this one had made the next update."""
        self.count: Counter[str] = Counter()
        self.first: dict[str, Record] = {}
        self._last: dict[str, Record] = {}
        self.recent_steps: deque[Record] = deque(maxlen=_RATE_STEPS)
        self.losses = Thinned()
        self.set_losses: dict[str, float] = {}
        self.measured: dict[str, dict[str, float]] = {}
        self.slow_ranks: dict[int, SlowRank] = {}
        self.wrong_bytes: list[str] = []
        self.lifetime = Lifetime()

    def add(self, records: Iterable[Record]) -> None:
        for record in records:
            kind = record["kind"]
            if kind == "eval" and (name := record.get("set")):
                kind = "eval_set"  # "eval" is that of the held-out data without a name
                if (loss := record.get("loss")) is not None:
                    self.set_losses[name] = loss
            if kind == "measured":
                self.measured[record["by"]] = measures(record)
            if kind == "slow_rank":
                self._name(record)
            if kind == "wrong_bytes":
                self.wrong_bytes.append(wrong_sentence(record))
            self.count[kind] += 1
            self.first.setdefault(kind, record)
            self._last[kind] = record
            if kind == "step":
                self.recent_steps.append(record)
                if self.back is None and record["step"] > self.reached:
                    self.back = record.get("time")
                self.losses.add(record["step"], record.get("loss"))
            self.lifetime.add(record)

    def _name(self, record: Record) -> None:
        self.slow_ranks.pop(rank := record["rank"], None)
        if not record.get("over"):
            why = record.get("why") or ""
            self.slow_ranks[rank] = SlowRank(record["step"], rank, record["machine"], record.get("ratio"), why)

    def last(self, kind: str) -> Record | None:
        return self._last.get(kind)

    @property
    def end(self) -> Record | None:
        """The record of its end, if that is the run's end: after a restart another start follows."""
        return None if self.last("restart") else self.last("end")

    @property
    def start_step(self) -> int | None:
        start = self.last("start")
        return start["step"] if start else None

    @property
    def step(self) -> int | None:
        """The last step, or the one that it goes on from; None before that is known."""
        step = self.last("step")
        return step["step"] if step else self.start_step


class Follower:
    """Reads a run's status again and again, each time only what is new."""

    def __init__(self, folder: Store, clock: Callable[[], float] | None = None) -> None:
        self._folder, self._clock = folder, clock or StoreClock(folder)
        self._generations: dict[int, Summary] = {}
        self._reader = RunReader(folder)

    @cached_property
    def _config(self) -> Config | None:
        """The run's settings, read once; None if they cannot be read."""
        with suppress(ConfigError):
            return run_config(self._folder)
        return None

    def read(self) -> RunStatus:
        """Return the run's state by its newest records.

        Figures that a start has not written yet are those of the start before it.
        """
        found = streams(self._folder.list(layout.METRICS))
        if self._reader.misses(found):
            self._generations, self._reader = {}, RunReader(self._folder)
        for number, records in self._reader.read(found):
            if number not in self._generations:
                self._generations[number] = Summary(self._step())
            self._generations[number].add(records)
        commit = self._last_commit()
        if not self._generations:
            state, reason = before_records(self._folder, self._clock)
            return RunStatus(
                self._folder.uri,
                state,
                last_commit_step=commit[0] if commit else None,
                last_commit_age_seconds=max(0.0, self._clock() - commit[1]) if commit else None,
                stop_requested=self._folder.exists(layout.STOP),
                reason=reason,
                next=next_command(self._folder, "stopped", committed=True) if state == "silent" and commit else "",
            )
        number = max(self._generations)
        newest = self._generations[number]
        now = self._clock()
        quiet = max(0.0, now - heard_of(newest, found, number))
        step, total = self._step(), self._newest_value("start", "total_steps")
        tokens_per_second, step_seconds = rates(newest)
        state, reason = judge_state(self._folder, number, newest, self._clock, quiet)
        restarts = self._restarts()
        gpu_hours = sum(map(gpu_seconds, self._generations.values())) / 3600
        price = self._config.track.price_per_gpu_hour if self._config else None
        return RunStatus(
            run=self._folder.uri,
            state=state,
            generation=number,
            restarts=restarts,
            lost_seconds=math.fsum(restart.lost_seconds or 0 for restart in restarts),
            again=sum(restart.again for restart in restarts),
            world_size=self._newest_value("start", "world_size"),
            sequence_parallel=self._newest_value("start", "sequence_parallel") or 1,
            machines=dict(Counter(map(str, self._newest_value("start", "machines") or ()))),
            slow_ranks=list(newest.slow_ranks.values()),
            wrong_bytes=[said for _, one in sorted(self._generations.items()) for said in one.wrong_bytes],
            device=self._newest_value("start", "device"),
            dashboard=self._newest_value("start", "dashboard"),
            start_seconds=_start_seconds(newest),
            start_slowest=late_parts(newest.last("start") or {}),
            step=step,
            total_steps=total,
            epoch=self._newest_value("step", "epoch"),
            passes=self._newest_value("step", "passes"),
            epochs=self._config.train.epochs if self._config else None,
            lr=self._newest_value("step", "lr"),
            loss_first=self._first_loss(),
            loss=self._newest_value("step", "loss"),
            loss_curve=self._loss_curve(),
            reward=self._newest_value("step", "reward"),
            accuracy=self._newest_value("step", "accuracy"),
            eval_loss=self._newest_value("eval", "loss"),
            eval_accuracy=self._newest_value("eval", "accuracy"),
            eval_losses=self._of_all(lambda records: records.set_losses),
            measured=self._of_all(lambda records: records.measured),
            tokens_per_second=tokens_per_second,
            eta_seconds=None
            if state != "running" or total is None or step_seconds is None
            else max(0, total - step) * step_seconds,
            last_commit_step=commit[0] if commit else None,
            last_commit_age_seconds=max(0.0, now - commit[1]) if commit else None,
            quiet_seconds=quiet,
            failed_saves=self._count("save_failed"),
            skipped_saves=self._count("save_skipped"),
            stop_requested=self._folder.exists(layout.STOP),
            reason=reason,
            gpu_hours=gpu_hours or None,
            cost=gpu_hours * price if gpu_hours and price is not None else None,
            next=next_command(self._folder, state, committed=commit is not None),
        )

    def _newest_first(self) -> list[Summary]:
        return [self._generations[number] for number in sorted(self._generations, reverse=True)]

    def _newest_value(self, kind: str, name: str) -> Any:
        """Return the value from the newest generation that has written a record of this kind.

        A generation that has just started has no loss yet.
        """
        return next((record.get(name) for records in self._newest_first() if (record := records.last(kind))), None)

    def _count(self, kind: str) -> int:
        """Return the number of records of this kind in all generations."""
        return sum(records.count[kind] for records in self._generations.values())

    def _step(self) -> int:
        return next((records.step for records in self._newest_first() if records.step is not None), 0)

    def _first_loss(self) -> float | None:
        """Return the loss of the lowest step, by the newest generation that took it."""
        firsts = [records.first["step"] for records in self._newest_first() if records.last("step")]
        return min(firsts, key=lambda record: record["step"]).get("loss") if firsts else None

    def _loss_curve(self) -> list[tuple[int, float]]:
        """Return the points of all starts. If starts have repeated steps, those of the newest count."""
        curve = Thinned()
        below: float = math.inf
        points: list[tuple[int, float]] = []
        for records in self._newest_first():
            # A newer start may have taken steps of an older one again. These count once, as the newer one took them.
            points += [point for point in reversed(records.losses.points) if point[0] < below]
            below = points[-1][0] if points else below
        for step, loss in reversed(points):
            curve.add(step, loss)
        return curve.points

    def _of_all(self, of: Callable[[Summary], dict[str, T]]) -> dict[str, T]:
        """Return the newest value of each name."""
        return {name: value for records in reversed(self._newest_first()) for name, value in of(records).items()}

    def _restarts(self) -> list[Restart]:
        """Return the starts after the first. One that was refused before it trained counts only if it is the newest."""
        newest = max(self._generations)
        numbers = [number for number in sorted(self._generations) if number == newest or not self._refused(number)]
        restarts = []
        for before, number in zip(numbers[:-1], numbers[1:], strict=True):
            earlier, records = self._generations[before], self._generations[number]
            end, start, step = earlier.last("end") or {}, records.last("start") or {}, records.start_step
            died, back = end.get("died_at"), records.back
            since = earlier.lifetime.ended if died is None else died
            restarts.append(
                Restart(
                    number,
                    step,
                    (end["reason"] or end["outcome"]) if end else _NO_END,
                    start.get("restored"),
                    died=died,
                    noticed=end.get("time"),
                    back=back,
                    lost_seconds=None if back is None or since is None else max(0.0, back - since),
                    again=0 if step is None else max(0, records.reached - step),
                    read_bytes=start.get("read_bytes"),
                )
            )
        return restarts

    def _refused(self, number: int) -> bool:
        records = self._generations[number]
        return records.start_step is None and records.last("end") is not None and records.last("restart") is None

    def _last_commit(self) -> tuple[int, float] | None:
        """Return (step, seconds since 1970) of the newest manifest in the store, whatever the metrics say."""
        newest = newest_commit(self._folder)
        return (newest.step, newest.manifest.modified.timestamp()) if newest and newest.manifest else None


def next_command(folder: Store, state: RunState, *, committed: bool) -> str:
    """Return the command that a person who sees the run in this state wants next, with what it is for.

    It is empty while the run goes on.
    """
    if state == "finished":
        return f"{command('export', folder, 'adapter/')} writes what was trained"
    resume = f"{command('resume', folder)} goes on"
    if state == "stopped":
        return resume if committed else ""
    if state in ("failed", "silent"):
        return f"{command('logs', folder)} shows the last lines" + (f"; {resume}" if committed else "")
    return ""


def gpu_seconds(records: Summary) -> float:
    """Return the time of all GPUs of a start, from its launch to its last record."""
    start = records.last("start")
    if start is None or not str(start.get("device")).startswith("cuda"):
        return 0.0
    return (start.get("world_size") or 0) * records.lifetime.seconds


def before_records(folder: Store, clock: Callable[[], float]) -> tuple[RunState, str]:
    """Return the state of a run that has no records, and why. Usually it has none yet."""
    owner = read_owner(folder)
    if owner is not None and not owner.is_alive(clock):
        return "silent", f"{_NEVER_BEGUN}{_said_by(owner)}"
    if owner is None and (owner := preparer(folder)) is not None:
        return "starting", f"{owner.sentence(clock())}, checks what the run needs"
    if owner is None and newest_commit(folder):
        return "silent", _NO_RECORDS
    return "starting", owner.sentence(clock()) if owner else ""


def _said_by(owner: Owner) -> str:
    """Say where a start's process has left what it said, and its last line if that is on this machine."""
    if owner.output is None:
        return ""
    place, last = f". Its output is in {owner.output} on {owner.host}", said_here(owner).strip().splitlines()[-1:]
    return f"{place}; it ends: {last[0][:_LONGEST_LINE]}" if last else place


def drivers() -> Path:
    """This user's folder of what drivers without a terminal say before they can write to their run."""
    return user_cache() / "drivers"


def said_here(owner: Owner) -> str:
    """Return what a process without a terminal has said, if it was started by this user on this machine.

    The store names the file, and whoever may write there could name another, so only files of drivers are read.
    """
    file = Path(owner.output or "")
    with suppress(OSError, ConfigError):
        if owner.is_here and file.parent == drivers():
            return file.read_text(errors="replace")
    return ""


def heard_of(newest: Summary, found: Mapping[str, Sequence[Segment]], number: int) -> float:
    """Return when the newest start, of this `number`, was heard of last, in seconds since 1970.

    As long as it goes on, the store's clock counts. A start that is over ended with its last record, because the folder
    may have been copied since.
    """
    written = last_written(found, number)
    return written if newest.end is None else newest.lifetime.ended or written


def judge_state(
    folder: Store, number: int, newest: Summary, clock: Callable[[], float], quiet: float
) -> tuple[RunState, str]:
    """Return the state of a run by its newest generation, of this `number`, and its owner, and why.

    The reason is the end of that generation, or who has taken the run since.
    """
    end, last = newest.last("end"), last_owner(folder)
    owner = None if last is None or last.ended else last
    # A run that nobody has taken is judged by its records: a large base takes minutes to load, without a line.
    begins = last is None and not (newest.last("start") or end)
    alive = owner.is_alive(clock) if owner else quiet < SILENT_SECONDS or begins
    if owner and newest.end and (owner.starts or 0) >= number:
        if alive:
            return "starting", owner.sentence(clock())  # and has no ranks yet
        if owner.output:
            return "silent", f"{_NEVER_BEGUN_AGAIN}{_said_by(owner)}"
    return _state(newest, alive), end["reason"] if end else ""


def _state(newest: Summary, alive: bool) -> RunState:
    if newest.end:
        return newest.end["outcome"]
    if not alive:
        return "silent"
    if newest.last("restart"):
        return "restarting"
    return "running" if newest.last("step") else "starting"


def _start_seconds(records: Summary) -> dict[str, float]:
    start, first = records.last("start") or {}, records.last("first_step")
    parts = {
        part: start[f"{part}_seconds"] for part in ("launch", "meet", "load", "restore") if f"{part}_seconds" in start
    }
    return parts | ({"first_step": first["seconds"]} if first else {})


_LATE_SECONDS = 5.0


def late_parts(start: Record) -> dict[str, dict[str, Any]]:
    """Return the parts of a start in which one rank took a third and some seconds longer than the median of all.

    Each has the `rank`, its `machine`, its `seconds` and the `median`. Other ranks waited for it.
    """
    found = {}
    for part, one in (start.get("slowest") or {}).items():
        if not isinstance(one, dict) or not {"rank", "machine"} <= one.keys():
            continue
        took, middle = one.get("seconds"), one.get("median")
        if not isinstance(took, int | float) or not isinstance(middle, int | float):
            continue
        if took > max(4 / 3 * middle, middle + _LATE_SECONDS):
            found[part] = one
    return found


def rates(records: Summary) -> tuple[float | None, float | None]:
    """Return (tokens per second, seconds per step) over the last steps; None before the first."""
    recent = records.recent_steps
    seconds = sum(record.get("seconds", 0) for record in recent)
    if not seconds:
        return None, None
    return sum(record.get("tokens", 0) for record in recent) / seconds, seconds / len(recent)
