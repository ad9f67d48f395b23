"""The protocol of trackers: places that keep or show what a run does, of which a run may have several at once.

    rank 0   metrics.py      the records, which are the run's only history; lines in the rank's log; curves in the
                             run's folder
             companion.py    a process of its own  ──►  wandb.py | mlflow.py | trackio.py

A service outside the run's folder may be slow, hang, or end the process that calls it. So its tracker runs in a process
of its own, which reads the records in the run's folder as `capstan status` does: the training waits for nothing, an
outage loses nothing, and what an earlier start left unsent is sent by the next one. Each service is a file of this
folder, and an extra installs its package.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple, Protocol

from trainer.config.registry import chosen, kinds
from trainer.config.run import Track
from trainer.errors import ConfigError
from trainer.run.records import Record


class Tracker(Protocol):
    """Keeps or shows records of a run.

    Its calls may fail, and all but `add` may wait; the caller makes sure that neither does harm. A subclass overrides
    the calls that it needs. The others do nothing.

    `name` completes "sending ..." for people. The caller calls `flush` about every `seconds` seconds.
    """

    name: str
    seconds: float

    def add(self, record: Record) -> None:
        """Take the next record. This call never waits."""

    def flush(self) -> None:
        """Bring the added records to where they are kept or shown."""

    def close(self) -> None:
        """Flush for the last time."""


class Page(NamedTuple):
    """The facts of the run that a service gets when it is opened.

    They are the same in every start, so the service finds its curves again.

    `id` is unique to the run, and `settings` is its whole configuration. `folder` is the run's folder if it is on this
    machine. `shown` is the last step that an earlier start has brought there, for a service that cannot be asked.
    """

    id: str
    name: str
    project: str
    group: str | None
    tags: list[str]
    settings: Mapping[str, Any]
    folder: str | None
    shown: int


class StepPoints(NamedTuple):
    """The points of all curves at one step. `time` is in seconds since 1970."""

    step: int
    time: float
    points: dict[str, float]


class Service(Protocol):
    """A place outside the run's folder that shows its curves, and continues the same curves in every start of the run.

    `shown` is the last step that the curves had when the service was opened; -1 before the first step.
    """

    shown: int

    def show(self, rows: Sequence[StepPoints]) -> None:
        """Show these rows, which follow the earlier ones.

        The call may wait and may fail; then the same rows come again.
        """
        ...

    def close(self, outcome: str | None) -> None:
        """End this start, with the outcome of its `end` record; None if the start was cut off."""
        ...


def points(record: Record) -> dict[str, float]:
    """Return the numbers of a record by the names of their curves. The names are the same in every service.

    `train/<name>` is of a step, `eval/<name>` or `eval/<set>/<name>` of an evaluation, and `<action>/<name>` of a
    measurement by an action (trainer/train/every/). A record of another kind has no points.
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
    """Steps that a service has not shown yet, each once and in order, whatever the starts of the run repeat.

    A step is complete, and becomes a row, when a later one has begun, because its evaluations come after it. Until then
    a start that repeats the step, because the start before was killed, adds to it and overrides its values.
    """

    def __init__(self, shown: int) -> None:
        self.shown = shown
        self.outcome: str | None = None
        self._rows: dict[int, StepPoints] = {}
        self._newest = shown

    def add(self, record: Record) -> None:
        self.outcome = record["outcome"] if record["kind"] == "end" else None
        if not (drawn := points(record)) or (step := record["step"]) < self._newest or step <= self.shown:
            return
        self._newest = step
        earlier = self._rows.get(step)
        self._rows[step] = StepPoints(step, record["time"], {**(earlier.points if earlier else {}), **drawn})

    def batches(self, most: int) -> Iterator[list[StepPoints]]:
        """Yield the next rows, at most so many at a time.

        Rows count as shown when the caller asks for the next ones; after a failure they come again. After the run's end
        its last step is complete too. A last step that a kill has cut off is left to the start that repeats it.
        """
        while rows := [row for row in self._rows.values() if row.step < self._newest or self.outcome][:most]:
            yield rows
            for row in rows:
                del self._rows[row.step]
            self.shown = rows[-1].step


class ServiceKind(NamedTuple):
    """A service that a name in `track.trackers` stands for.

    `package` is imported. The extra that installs it has the service's name.
    """

    opens: Callable[[Page], Service]
    package: str


def find_service(name: str) -> ServiceKind:
    """Find the service of this name. Raises `ConfigError` if there is none."""
    return chosen(kinds("trainer.run.trackers", "SERVICES"), "track.trackers", name)


def check_trackers(track: Track) -> None:
    """Raise `ConfigError` for a name in `track.trackers` that is unknown, or whose package is not installed."""
    for name in track.trackers:
        if find_spec(find_service(name).package) is None:
            raise ConfigError(
                f"track.trackers: {name} is not installed. Install it with pip install 'capstan-llm[{name}]', or leave"
                " it out."
            )
