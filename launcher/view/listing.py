"""The runs of stores, each in a line, with a few requests for each, however long a run is: `capstan ls`, the board."""

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from launcher.view.console import FoldedTable
from launcher.view.runs import NAME, is_there, poll_seconds
from launcher.view.status import ENDED, RunState, Summary, before_records, gpu_seconds, heard_of, judge_state, rates
from launcher.view.sweep import is_sweep, read_plan
from launcher.view.watch import colored
from trainer.config.reading import read_yaml
from trainer.errors import CapstanError, StorageError
from trainer.run import layout
from trainer.run.folder import name_of
from trainer.run.lines import PlainLines, duration, of_total
from trainer.run.owner import StoreClock, last_owner
from trainer.run.records import edge_records, spread_records, starts_in
from trainer.run.segments import Segment, streams
from trainer.store.store import Store

_EDGE_BYTES = 2**17
_SHORT_EDGE_BYTES = 2**12
_RUNS_AT_A_TIME = 32
_PLACES, _MOST_CURVES = 24, 2000
_MOST_STARTS = 16
_ENDED_SECONDS = 60.0
"""A run that has ended is read again after so long, as somebody may have resumed it."""


@dataclass(frozen=True)
class RunLine:
    """A run in a few words. Losses are in nats. `age_seconds` is the time since its last sign of life.

    None is what is not known. `state` is "unreadable" if the store does not tell, and `reason` then says why. A sweep
    has a number of `trials`, and is "running", "silent" or "over". `doing` says what a run does beside its steps.
    `began` is when the newest start did, in seconds since 1970, and `curve` has (step, loss) of some of its steps.
    `gpu_hours` are those of all starts; None if there are very many.
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
    began: float | None = None
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
    listing = Listing([store], clock, _EDGE_BYTES)
    lines, _ = listing.read(math.inf)
    listing.close()
    return RunList(store.uri, [line.line for line in lines if line.line])


@dataclass(frozen=True, eq=False)
class Line:
    """A run's line and the place of its store among the stores. `line` is None until the run has been read.

    `heard` is in seconds since 1970. `price` is track.price_per_gpu_hour.
    """

    place: int
    name: str
    line: RunLine | None = None
    heard: float = 0.0
    price: float | None = None

    @property
    def key(self) -> tuple[int, str, float | None, int]:
        """The key of the run's curve. One step more does not change it, because nobody would see the difference."""
        step, total, began = (self.line.step, self.line.total_steps, self.line.began) if self.line else (0, None, None)
        return self.place, self.name, began, step // max(1, (total or step) // 40)

    @property
    def words(self) -> str:
        """The words that a filter looks into."""
        return f"{self.name} {self.line.state} {self.line.reason}".lower() if self.line else self.name.lower()

    @property
    def cost(self) -> float | None:
        hours = self.line.gpu_hours if self.line else None
        return None if hours is None or self.price is None else hours * self.price

    @property
    def whole_cost(self) -> float | None:
        """The cost of the run at its last step, if it goes on as it has so far."""
        if self.cost is None or not self.line or self.line.eta_seconds is None or not self.line.step:
            return None
        return self.cost * (self.line.total_steps or self.line.step) / self.line.step


class Listing:
    """Reads the runs of `stores`, many at a time. Folders that are no runs are passed over.

    `silent` says why a store does not answer, by its place. Its earlier runs then stay in the list.
    """

    def __init__(
        self, stores: Sequence[Store], clock: Callable[[], float] | None = None, edge: int = _SHORT_EDGE_BYTES
    ) -> None:
        self.stores, self._edge = stores, edge
        self._clocks = [clock or StoreClock(store) for store in stores]
        self._pool = ThreadPoolExecutor(_RUNS_AT_A_TIME, "listing")
        # Listing a store does not wait until its thousand runs are read.
        self._listers = ThreadPoolExecutor(max(1, len(stores)), "stores")
        self._known: dict[tuple[int, str], Line | None] = {}
        self._looked: dict[tuple[int, str], float] = {}
        self._reading: dict[tuple[int, str], Future[None]] = {}
        self._names: dict[int, list[str]] = {}
        self._listing: dict[int, Future[tuple[list[str], Any]]] = {}
        self.silent: dict[int, str] = {}
        self._curves: dict[tuple[int, str, float | None, int], list[tuple[int, float]]] = {}
        self._lock = threading.Lock()

    def read(self, patience: float) -> tuple[list[Line], int]:
        """Return the lines, those with the newest signs of life first, and how many runs have not been read yet.

        After `patience` seconds it returns what is known. What is being read comes with a later call.

        Raises:
            StorageError: no store can be listed.
        """
        began = time.monotonic()
        names = self._list(patience)
        with self._lock:
            for key in self._known.keys() - names:
                del self._known[key]
            for key in sorted(names):
                if key not in self._reading and self._is_old(key):
                    self._reading[key] = self._pool.submit(self._read, key)
            reading = list(self._reading.values())
        wait(reading, timeout=_left(began, patience))
        with self._lock:
            known = dict(self._known)
        unread = names - known.keys()
        lines = [line for line in known.values() if line] + [Line(*key) for key in unread]
        return sorted(lines, key=lambda line: (-line.heard, line.place, line.name)), len(unread)

    def _list(self, patience: float) -> set[tuple[int, str]]:
        with self._lock:
            for place, store in enumerate(self.stores):
                if place not in self._listing:
                    self._listing[place] = self._listers.submit(store.children)
            listing, failed = dict(self._listing), list[StorageError]()
        wait(listing.values(), timeout=None if patience == math.inf else max(0.0, patience))
        with self._lock:
            for place, future in listing.items():
                if not future.done():
                    self.silent[place] = "it has not answered yet"
                    continue
                self._listing.pop(place, None)
                try:
                    self._names[place] = [name for name in future.result()[0] if NAME.fullmatch(name)]
                    self.silent.pop(place, None)
                except StorageError as error:
                    self.silent[place] = str(error)
                    failed.append(error)
            if len(failed) == len(self.stores) > 0 and not self._names:
                raise failed[0]
            return {(place, name) for place, names in self._names.items() for name in names}

    def with_curves(self, lines: Sequence[Line], patience: float) -> list[Line]:
        """Return `lines` with curves over all steps of their newest starts, as far as they can be read in this time."""
        began, wanted = time.monotonic(), [line for line in lines if line.line and line.line.step]
        reading = {line: self._pool.submit(self._curve, line) for line in wanted if line.key not in self._curves}
        wait(reading.values(), timeout=_left(began, patience))
        curves = {line.key: curve for line in wanted if (curve := self._curves.get(line.key))}
        return [
            replace(line, line=replace(line.line, curve=curves[line.key])) if line.line and line.key in curves else line
            for line in lines
        ]

    def _curve(self, line: Line) -> None:
        with suppress(StorageError):
            curve = loss_curve(self.stores[line.place].sub(line.name), _PLACES)
            if len(self._curves) >= _MOST_CURVES:
                self._curves.clear()
            self._curves[line.key] = curve

    def forget(self, folder: Store) -> None:
        """Read the run in `folder` anew at the next look, as something was done with it."""
        with self._lock:
            for place, store in enumerate(self.stores):
                if folder.uri == f"{store.uri}/{name_of(folder)}":
                    self._looked.pop((place, name_of(folder)), None)

    def close(self) -> None:
        for pool in (self._pool, self._listers):
            pool.shutdown(wait=False, cancel_futures=True)

    def _is_old(self, key: tuple[int, str]) -> bool:
        line = self._known.get(key)
        ended = line is None or line.line is None or line.line.state in (*ENDED, "over")
        seconds = _ENDED_SECONDS if ended else 2 * poll_seconds(self.stores[key[0]])
        return time.monotonic() - self._looked.get(key, -seconds) >= seconds

    def _read(self, key: tuple[int, str]) -> None:
        place, name = key
        folder, line = self.stores[place].sub(name), None
        try:
            if is_there(folder):
                found = run_line(folder, name, self._clocks[place], self._edge)
                heard = 0.0 if found.age_seconds is None else time.time() - found.age_seconds
                line = Line(place, name, found, heard, _price(folder) if found.gpu_hours else None)
        except Exception as error:
            why = str(error) if isinstance(error, StorageError) else f"{type(error).__name__}: {error}"
            line = Line(place, name, RunLine(name, "unreadable", reason=why))
        finally:
            with self._lock:
                self._known[key], self._looked[key] = line, time.monotonic()
                self._reading.pop(key, None)


def _left(began: float, patience: float) -> float | None:
    return None if patience == math.inf else max(0.0, patience - (time.monotonic() - began))


def _price(folder: Store) -> float | None:
    """Return the price of a GPU hour by the run's settings; None if they have none or are damaged."""
    with suppress(CapstanError, AttributeError):
        price = read_yaml(folder.get(layout.CONFIG), layout.CONFIG)["track"]["price_per_gpu_hour"]
        return price if isinstance(price, int | float) and not isinstance(price, bool) else None
    return None


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
    state, reason = judge_state(folder, numbers[0], newest, clock, quiet)

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
        gpu_hours=_gpu_hours(folder, numbers, found, newest),
        began=newest.lifetime.began,
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


def _gpu_hours(
    folder: Store, numbers: Sequence[int], found: Mapping[str, Sequence[Segment]], newest: Summary
) -> float | None:
    if len(numbers) > _MOST_STARTS:
        return None
    earlier = (_summary(folder, number, found, _SHORT_EDGE_BYTES) for number in numbers[1:])
    return math.fsum(map(gpu_seconds, (newest, *earlier))) / 3600 or None


def _progress(run: RunLine) -> str:
    if run.trials is not None:
        return f"a sweep of {run.trials} trials"
    total = run.total_steps or 0
    share = f" ({100 * run.step / total:.0f} %)" if 0 < total >= run.step else ""
    return of_total(run.step, run.total_steps) + share


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
