"""`capstan ls`: the runs of a store in a table, with a few requests for each, however long a run is."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from launcher.view.console import FoldedTable
from launcher.view.runs import runs
from launcher.view.status import ENDED, RunState, Summary, before_records, gpu_seconds, heard_of, judge_state, rates
from launcher.view.sweep import is_sweep, read_plan
from launcher.view.watch import colored
from trainer.errors import StorageError
from trainer.run import layout
from trainer.run.lines import PlainLines, duration, of_total
from trainer.run.owner import StoreClock, last_owner
from trainer.run.records import edge_records, spread_records, starts_in
from trainer.run.segments import Segment, streams
from trainer.store.store import Store

_EDGE_BYTES = 2**17
_RUNS_AT_A_TIME = 16


@dataclass(frozen=True)
class RunLine:
    """A run in a few words. Losses are in nats. `age_seconds` is the time since its last sign of life.

    None is what is not known. `state` is "unreadable" if the store does not tell, and `reason` then says why. A sweep
    has a number of `trials`, and is "running", "silent" or "over". `doing` says what a run does beside its steps.
    `curve` has (step, loss) of some steps of the newest start. `gpu_hours` are those of a run with a single start.
    """

    run: str
    state: RunState | str
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    age_seconds: float | None = None
    reason: str = ""
    trials: int | None = None
    doing: str = ""
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    gpu_hours: float | None = None
    curve: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class RunList:
    """The runs of a store, those with the newest signs of life first."""

    store: str
    runs: list[RunLine]

    def table(self) -> FoldedTable | str:
        if not self.runs:
            return f"{self.store} has no runs"
        table = FoldedTable("run", "state", "step", "loss", "held out", "last heard of")
        for run in self.runs:
            age = "" if run.age_seconds is None else f"{duration(run.age_seconds)} ago"
            table.add_row(run.run, colored(run.state), _progress(run), _loss(run.loss), _loss(run.eval_loss), age)
        return table


def list_runs(store: Store, clock: Callable[[], float] | None = None) -> RunList:
    """Return the runs of a store, including those that are being prepared.

    `clock` is the store's by default. Raises `StorageError` when the store itself cannot be listed.
    """
    names, clock = runs(store, prepared=True), clock or StoreClock(store)
    with ThreadPoolExecutor(_RUNS_AT_A_TIME) as pool:
        found = list(pool.map(lambda name: run_line(store.sub(name), name, clock), names))
    return RunList(store.uri, sorted(found, key=lambda run: (run.age_seconds is None, run.age_seconds, run.run)))


def run_line(folder: Store, name: str, clock: Callable[[], float], edge: int = _EDGE_BYTES) -> RunLine:
    """Return the line of the run in `folder`, which says so if it cannot be read.

    It is read from so many bytes at each end of the records: fewer are faster, and may lack an old evaluation's loss.
    """
    try:
        return _read(folder, name, clock, edge)
    except StorageError as error:
        return RunLine(name, "unreadable", reason=str(error))


def _read(folder: Store, name: str, clock: Callable[[], float], edge: int) -> RunLine:
    """Read the run by the ends of its newest generation's records.

    If that generation has taken no step yet, those of the one before are read too.
    """
    found = streams(folder.list(layout.METRICS))
    numbers = starts_in(found)[::-1]
    if not numbers and is_sweep(folder):
        return _sweep(folder, name, clock)
    if not numbers:
        state, reason = before_records(folder, clock)
        claimed = folder.head(layout.CONFIG if folder.exists(layout.CONFIG) else layout.PREPARING)
        return RunLine(name, state, age_seconds=max(0.0, clock() - claimed.modified.timestamp()), reason=reason)
    summaries = [_summary(folder, numbers[0], found, edge)]
    if not summaries[0].last("step") and numbers[1:]:
        summaries.append(_summary(folder, numbers[1], found, edge))
    newest = summaries[0]
    quiet = max(0.0, clock() - heard_of(newest, found, numbers[0]))
    state, reason = judge_state(folder, newest, clock, quiet)

    def value(kind: str, field: str) -> Any:
        return next((record.get(field) for each in summaries if (record := each.last(kind))), None)

    step, total = next((each.step for each in summaries if each.step is not None), 0), value("start", "total_steps")
    tokens_per_second, step_seconds = rates(newest)
    left = None if state != "running" or total is None or step_seconds is None else max(0, total - step) * step_seconds
    return RunLine(
        name,
        state,
        step,
        total,
        value("step", "loss"),
        value("eval", "loss"),
        quiet,
        reason,
        doing="" if state in ENDED else _doing(newest),
        tokens_per_second=tokens_per_second,
        eta_seconds=left,
        gpu_hours=gpu_seconds(newest) / 3600 or None if len(numbers) == 1 else None,
        curve=next((points for each in summaries if (points := each.losses.points)), []),
    )


def loss_curve(folder: Store, places: int) -> list[tuple[int, float]]:
    """Return (step, loss) at about so many places of the newest start of the run in `folder`, of any length."""
    found = streams(folder.list(layout.METRICS))
    newest = max(starts_in(found), default=0)
    steps = (record for record in spread_records(folder, newest, found, places) if record["kind"] == "step")
    return sorted({record["step"]: record["loss"] for record in steps if "loss" in record}.items())


def _doing(newest: Summary) -> str:
    """Return what a start does before its first step, or what it waits for after one."""
    if waiting := newest.last("waiting"):
        step = newest.last("step")
        return PlainLines(1).of(waiting) or "" if not step or step["step"] < waiting["step"] else ""
    phase = newest.last("phase")
    return PlainLines(1).of(phase) or "" if phase and not newest.last("step") else ""


def _sweep(folder: Store, name: str, clock: Callable[[], float]) -> RunLine:
    """Read a sweep by its owner alone. Its trials are runs of the same store, each with a line of its own."""
    owner = last_owner(folder)
    trials = len(read_plan(folder).trials)
    if owner is None:
        return RunLine(name, "over", trials=trials)
    state = "running" if owner.is_alive(clock) else "over" if owner.ended else "silent"
    return RunLine(name, state, age_seconds=max(0.0, clock() - owner.time), trials=trials)


def _summary(folder: Store, number: int, found: Mapping[str, Sequence[Segment]], edge: int) -> Summary:
    summary = Summary()
    summary.add(edge_records(folder, number, found, edge))
    return summary


def _progress(run: RunLine) -> str:
    if run.trials is not None:
        return f"a sweep of {run.trials} trials"
    total = run.total_steps or 0
    share = f" ({100 * run.step / total:.0f} %)" if 0 < total >= run.step else ""
    return of_total(run.step, run.total_steps) + share


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
