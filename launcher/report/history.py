"""The history of a run: its starts, and the steps that count, read from the records of all its generations.

A start goes on from a committed checkpoint, so its steps replace the equal and later ones of the starts before it.
Those were computed in vain.
"""

import math
from array import array
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from launcher.view.status import stretches
from trainer.run import layout
from trainer.run.folder import SettingChange
from trainer.run.records import PARTS, Lifetime, Record, RunReader
from trainer.run.segments import streams
from trainer.store.store import Store

Point: TypeAlias = tuple[float, float]

MOST_POINTS = 600
"""A plot is some hundred pixels wide: more points than this could not be told apart."""
FEW_POINTS = 200
"""A small plot has at most so many."""
_NO_MEASURE = {"kind", "step", "time", "clock"}


class Columns:
    """One column for each number that steps have, in the order of the steps.

    A step that lacks a number has NaN there.
    """

    def __init__(self) -> None:
        self.steps = array("q")
        self._columns: dict[str, array[float]] = {}

    def add(self, record: dict[str, Any]) -> None:
        """Add a step's record. A text, or a number that is not finite, is left out."""
        before = len(self.steps)
        self.steps.append(record["step"])
        for name, value in record.items():
            if name in _NO_MEASURE or not _is_number(value):
                continue
            if (column := self._columns.get(name)) is None:
                column = self._columns[name] = array("d")
            if len(column) < before:
                column.extend([math.nan] * (before - len(column)))
            column.append(value)

    def cut(self, step: int) -> "Columns":
        """Remove the steps after `step`. Returns them, in columns of their own."""
        place, taken = bisect_right(self.steps, step), Columns()
        taken.steps = self.steps[place:]
        taken._columns = {name: column[place:] for name, column in self._columns.items()}
        del self.steps[place:]
        for column in self._columns.values():
            del column[place:]
        return taken

    @property
    def names(self) -> list[str]:
        return [name for name in self._columns if next(self.values(name), None) is not None]

    def points(self, name: str) -> Iterator[Point]:
        """Return (step, value) of each step that has this number."""
        column = self._columns.get(name, ())
        return ((step, value) for step, value in zip(self.steps, column, strict=False) if not math.isnan(value))

    def values(self, name: str) -> Iterator[float]:
        return (value for _, value in self.points(name))

    def sum(self, name: str) -> float:
        return math.fsum(self.values(name))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def finite_points(points: Sequence[tuple[Any, Any]]) -> list[Point]:
    """Return those of `points` that can be drawn."""
    return [(x, y) for x, y in points if _is_number(x) and _is_number(y)]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most `most` of `points`, in their order.

    They are the first, the last, and of each stretch the lowest and the highest.
    """
    if len(points) <= most:
        return list(points)
    kept = {0, len(points) - 1}
    for begin, end in stretches(len(points), most // 2 - 1):
        stretch = range(begin, end)
        kept |= {min(stretch, key=lambda at: points[at][1]), max(stretch, key=lambda at: points[at][1])}
    return [points[at] for at in sorted(kept)]


def means(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return the mean of each stretch of `points`, at the stretch's last x.

    The result is empty if there are few enough points to show them all.
    """
    if len(points) <= most:
        return []
    return [
        (points[end - 1][0], math.fsum(y for _, y in points[begin:end]) / (end - begin))
        for begin, end in stretches(len(points), most // 4)
    ]


_NO_END = "it ended without a word, killed or with its machine"
_LOST = {"died", "lost_machine", "hung_ranks"}
"""Fields that the record of an end has if a rank or a machine was lost."""


@dataclass
class PastStart:
    """One start of the run. Times are seconds since 1970. `seconds` has the durations of parts of the start.

    `step` is the state that it went on from; None if it never trained. `last_step` is the last step that it took.
    `lost`: a rank or a machine was lost, and `reason` says which. `restored` is where its first state was: checkpoint,
    memory or neighbour. `read_bytes` of the base were read. `died_at`, in seconds since 1970, is when a rank died, if a
    keeper has seen it.
    """

    number: int
    step: int | None = None
    last_step: int | None = None
    world_size: int | None = None
    sequence_parallel: int = 1
    device: str | None = None
    machines: int | None = None
    lifetime: Lifetime = field(default_factory=Lifetime)
    seconds: dict[str, float] = field(default_factory=dict)
    outcome: str = ""
    reason: str = ""
    changes: list[str] = field(default_factory=list)
    lost: bool = False
    lost_steps: int = 0
    lost_seconds: float = 0.0
    restored: str | None = None
    read_bytes: int | None = None
    died_at: float | None = None

    @property
    def lasted(self) -> float:
        """The seconds from the start of its processes to its last record."""
        return self.lifetime.seconds

    @property
    def rank_hours(self) -> float:
        return (self.world_size or 0) * self.lasted / 3600


@dataclass
class History:
    """The starts and steps of a run that count.

    `others` are the records other than steps, by kind. The evaluations and commits of steps that do not count are left
    out.
    """

    starts: list[PastStart] = field(default_factory=list)
    steps: Columns = field(default_factory=Columns)
    others: dict[str, list[Record]] = field(default_factory=lambda: defaultdict(list))

    def newest(self, kind: str) -> Record:
        """Return the newest record of this kind, or an empty one."""
        return next(iter(self.others.get(kind, [])[-1:]), {})


class HistoryReader:
    """Reads a run's history again and again, each time only what is new. A damaged record counts as none."""

    def __init__(self, folder: Store) -> None:
        self._folder, self._history, self._reader = folder, History(), RunReader(folder)

    def read(self) -> History:
        """Return the history up to now. It is the same object at every call, unless somebody has removed the run."""
        found = streams(self._folder.list(layout.METRICS))
        if self._reader.misses(found):
            self._history, self._reader = History(), RunReader(self._folder)
        history, numbers = self._history, {start.number for start in self._history.starts}
        for number, records in self._reader.read(found):
            if number not in numbers:
                history.starts.append(PastStart(number))
            start = next(start for start in history.starts if start.number == number)
            _read(history, start, records)
        for start in history.starts[:-1]:
            if not start.outcome:
                start.outcome, start.reason, start.lost = "lost", _NO_END, True
        return history


def _read(history: History, start: PastStart, records: Iterable[Record]) -> None:
    for record in records:
        kind, step = record["kind"], record.get("step")
        if kind in ("start", "step") and start.step is None and step is not None:
            # A start whose own record is lost went on from the state before its first step.
            begun = step - (kind == "step")
            start.step = begun
            _go_on_from(history, begun)
        if kind == "step":
            history.steps.add(record)
            start.last_step = step
        elif kind == "start":
            _add_facts(start, record)
        elif kind == "first_step":
            start.seconds["first step"] = record["seconds"]
        elif kind == "change":
            change = SettingChange(str(record.get("setting")), record.get("old"), record.get("new"))
            start.changes.append(change.sentence())
        elif kind == "end":
            start.outcome, start.reason = record["outcome"], record["reason"]
            start.lost = start.lost or not record.keys().isdisjoint(_LOST)
            start.died_at = record.get("died_at", start.died_at)
        if kind != "step":
            history.others[kind].append(record)
        start.lifetime.add(record)


def _go_on_from(history: History, step: int) -> None:
    """Take back the steps after `step`, and what was measured or committed in them."""
    taken = history.steps.cut(step)
    # The newest start is asked first, because each has only the steps after the state that it went on from.
    for earlier in reversed(history.starts[:-1]):
        lost = taken.cut(earlier.step or 0)
        earlier.lost_steps += len(lost.steps)
        earlier.lost_seconds += lost.sum("seconds")
    for kind in ("eval", "measured", "commit", "experts"):
        history.others[kind] = [record for record in history.others[kind] if record.get("step", 0) <= step]


def _add_facts(start: PastStart, record: Record) -> None:
    start.world_size, start.device = record.get("world_size"), record.get("device")
    start.sequence_parallel = record.get("sequence_parallel") or 1
    start.restored, start.read_bytes = record.get("restored"), record.get("read_bytes")
    start.machines = len(set(map(str, record.get("machines") or ()))) or None
    for part in PARTS:
        if (took := record.get(f"{part}_seconds")) is not None:
            start.seconds[part] = took
