"""The protocol of trackers: places that keep or show what a run does, of which a run may have several at once.

    rank 0   metrics.py ──►  jsonl.py         the records, which are the run's only history
                             tensorboard.py   curves in the run's folder
                             printed.py       lines in the rank's log
                             tracker_process.py ──►  companion.py, a process of its own
                                                     ──►  wandb.py | mlflow.py | trackio.py

A service outside the run's folder may be slow, hang, or end the process that calls it. So its tracker runs in a process
of its own, which reads the records in the run's folder as `capstan status` does: the training waits for nothing, an
outage loses nothing, and what an earlier start left unsent is sent by the next one.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from trainer.run.records import Record


class Tracker(Protocol):
    """Keeps or shows records of a run. Its calls may fail, and all but `add` may wait: whoever calls sees that it does
    no harm. A class of it says what it does; what it leaves out does nothing.

    `name` completes "sending ..." for people; `flush` is wanted every so many `seconds`.
    """

    name: str
    seconds: float

    def add(self, record: Record) -> None:
        """Take the next record. Never waits."""

    def flush(self) -> None:
        """Bring what was added to where it is kept or shown."""

    def close(self) -> None:
        """`flush` for the last time."""


class Page(NamedTuple):
    """The facts of the run that a service gets when it is opened. They are the same in every start, so that it finds
    its curves again.

    `id` is unique to the run, `settings` is its whole configuration, and `folder` the run's folder where that is one of
    this machine. `shown` is the last step that an earlier start has brought there, for a service that cannot be asked.
    """

    id: str
    name: str
    project: str
    group: str | None
    tags: list[str]
    settings: Mapping[str, Any]
    folder: str | None
    shown: int


class Row(NamedTuple):
    """The points of all curves at one step; `time` is in seconds since 1970."""

    step: int
    time: float
    points: dict[str, float]


class Service(Protocol):
    """A place outside the run's folder that shows its curves, and goes on with the same ones in every start of the run.

    `shown` is the last step that they had when it was opened; -1 before the first.
    """

    shown: int

    def show(self, rows: Sequence[Row]) -> None:
        """Add these rows, which come behind those before. It may wait, and fail: they come again then."""
        ...

    def close(self, outcome: str | None) -> None:
        """The start has ended, with the outcome of its `end` record; None where it was cut off."""
        ...


def points(record: Record) -> dict[str, float]:
    """The numbers of a record by the curves that they are points of, which have the same names everywhere:
    `train/<name>` of a step, `eval/<name>` or `eval/<set>/<name>` of an evaluation, `<action>/<name>` of what an action
    (trainer/train/every/) measured. Empty for a record of another kind.
    """
    if record["kind"] == "step":
        curve = "train"
    elif record["kind"] == "eval":
        curve = f"eval/{record['set']}" if record.get("set") else "eval"
    elif record["kind"] == "measured":
        curve = record["by"]
    else:
        return {}
    return {
        f"{curve}/{name}": value
        for name, value in record.items()
        if name not in ("step", "time", "clock") and _draws(value)
    }


def _draws(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Unshown:
    """Steps that a service has not shown yet, each of them once and in order, whatever starts of the run repeat.

    A step is whole, and so a row, when a later one has begun: its evaluations come after it. Until then a start that
    repeats it, because the one before was killed, adds to it and counts.
    """

    def __init__(self, shown: int) -> None:
        self.shown = shown
        self.outcome: str | None = None
        self._rows: dict[int, Row] = {}
        self._newest = shown

    def add(self, record: Record) -> None:
        self.outcome = record["outcome"] if record["kind"] == "end" else None
        if not (drawn := points(record)) or (step := record["step"]) < self._newest or step <= self.shown:
            return
        self._newest = step
        earlier = self._rows.get(step)
        self._rows[step] = Row(step, record["time"], {**(earlier.points if earlier else {}), **drawn})

    def batches(self, most: int) -> Iterator[list[Row]]:
        """The next rows, at most so many at a time. They count as shown once the next ones are asked for: after a
        failure they come again. After the run's end its last step is whole, too; one that a kill has cut off is left to
        the start that repeats it.
        """
        while rows := [row for row in self._rows.values() if row.step < self._newest or self.outcome][:most]:
            yield rows
            for row in rows:
                del self._rows[row.step]
            self.shown = rows[-1].step
