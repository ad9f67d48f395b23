"""The state of a sweep, from its folder and those of its trials alone: no Ray, no torch, even when all is over."""

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from launcher.policy.comparable import Metric
from launcher.policy.trials import SearchPlan, Sensitivity, Trial, sensitivities, trial_in_words, word
from launcher.view.console import FoldedTable, Terminal, facts, outdated
from launcher.view.runs import poll_seconds
from launcher.view.status import Follower, RunStatus
from trainer.config.evaluation import UNNAMED, split_of
from trainer.config.sweep import TRAIN
from trainer.errors import NOT_JSON, ConfigError, Damaged, NotFound, StorageError
from trainer.run import layout
from trainer.run.folder import command, run_config, store_of
from trainer.run.lines import of_total
from trainer.run.owner import StoreClock, last_owner
from trainer.run.records import Record, RunReader
from trainer.run.requests import read_stop, stop_requester
from trainer.run.segments import streams
from trainer.store.store import Store, read_twice

_SMOOTHED_STEPS = 10
"""The training loss is a mean over so many steps, since that of one step is that of its few rows."""


class Scores:
    """The metric of the run in `folder` after each step that has one; NaN if it was no finite number.

    Each look reads only what is new. Step 0 has none, because there a trial is still the base.
    """

    def __init__(self, folder: Store, metric: Metric) -> None:
        self._folder, self._metric = folder, metric
        self._reader = RunReader(folder)
        self._losses: dict[int, float] = {}
        self._by_step: dict[int, float] = {}
        self.of_data = TRAIN if metric.of == TRAIN else split_of(metric.of)
        self.data: Mapping[str, str | None] = {}
        """The fingerprints of the data of the newest start, where they are known; the metric's own is that of
        `of_data`.
        """

    def read(self) -> dict[int, float]:
        """Return all of them so far, by step, in order.

        A start that goes on from a commit takes some steps a second time. Then its figures count.
        """
        for _, records in self._reader.read(streams(self._folder.list(layout.METRICS))):
            for record in records:
                self._add(record)
        return dict(sorted(self._by_step.items()))

    def _add(self, record: Record) -> None:
        if record["kind"] == "start":
            self.data = record.get("data", {})
        step, value = record.get("step"), record.get(self._metric.measure)
        if not isinstance(step, int) or step < 1:
            return
        if not isinstance(value, int | float) or not math.isfinite(value):
            value = math.nan
        if self._metric.of == TRAIN and record["kind"] == "step":
            self._losses[step] = value
            recent = range(step - _SMOOTHED_STEPS + 1, step + 1)
            self._by_step[step] = fmean(self._losses[earlier] for earlier in recent if earlier in self._losses)
        elif record["kind"] == "eval" and record.get("set", UNNAMED) == self._metric.of:
            self._by_step[step] = value


BY = "capstan sweep"
"""The owner of a sweep and of its trials, and the author of the stop requests to them that end the whole sweep."""
EARLY = "the sweep, as others were better"
"""The author of the stop request to a trial that ends early."""

SweepState = Literal["running", "finished", "stopped", "silent"]
_LOOK_SECONDS = 2.0
STOPPED_EARLY = "stopped early"
DONE = ("finished", STOPPED_EARLY)
"""The states of trials that stay as they are when the sweep is resumed: all others go on."""
OVER = (*DONE, "failed")
"""The states of trials that a sweep has nothing to wait for."""
_SAME_DATA = ("optim.", "train.", "tuning.", "quant.", "run.")
"""Settings that change nothing of the compiled data."""


@dataclass(frozen=True)
class TrialStatus:
    """One trial now.

    `state` is its run's (launcher/view/status.py), or "waiting" before its turn, or "stopped early". `value` is the
    metric at `value_step`, the last step that was evaluated. It is also None if it was no finite number there, or was
    measured on `other_data` than the first trial's, because a file was changed in between.
    """

    number: int
    run: str
    settings: dict[str, Any]
    state: str
    step: int = 0
    total_steps: int | None = None
    value: float | None = None
    value_step: int | None = None
    last_commit_step: int | None = None
    reason: str = ""
    other_data: bool = False


@dataclass(frozen=True)
class SweepStatus:
    """A sweep at one moment. `best` is the number of the trial that is best so far, `next` the suggested command."""

    sweep: str
    state: SweepState
    metric: str
    mode: str
    trials: list[TrialStatus]
    best: int | None = None
    sensitivity: list[Sensitivity] = field(default_factory=list)
    next: str = ""

    @property
    def settings(self) -> list[str]:
        """The dotted names of the settings that are tried."""
        return list(self.trials[0].settings) if self.trials else []

    @property
    def best_trial(self) -> TrialStatus | None:
        """The trial that is best so far."""
        return next((trial for trial in self.trials if trial.number == self.best), None)

    def counts(self) -> dict[str, int]:
        """Return how many trials are in each state."""
        states = [trial.state for trial in self.trials]
        return {state: states.count(state) for state in dict.fromkeys(states)}


def is_sweep(folder: Store) -> bool:
    return folder.exists(layout.SWEEP)


@read_twice
def read_plan(folder: Store) -> SearchPlan:
    """Return the trials of the sweep in `folder`.

    Raises `ConfigError` if there is no sweep, and `Damaged` if it cannot be read.
    """
    try:
        return SearchPlan.from_json(json.loads(folder.get(layout.SWEEP)))
    except NotFound as error:
        raise ConfigError(f"{folder.uri} holds no {layout.SWEEP}, so it is no sweep.") from error
    except (*NOT_JSON, LookupError, TypeError) as error:
        raise Damaged(f"{folder.uri}/{layout.SWEEP} is damaged: {error}.") from error


def trial_folders(folder: Store) -> list[Store]:
    """Return the folders of the sweep's trials that have begun."""
    runs = (_beside(folder, trial.run) for trial in read_plan(folder).trials)
    return [run for run in runs if run.exists(layout.CONFIG)]


def read_sweep(folder: Store, clock: Callable[[], float] | None = None) -> SweepStatus:
    """Return the sweep now. Raises `ConfigError` if the folder holds none."""
    return SweepFollower(folder, clock).read()


class SweepFollower:
    """Reads a sweep's state again and again, each time only what is new."""

    def __init__(self, folder: Store, clock: Callable[[], float] | None = None) -> None:
        self._folder, self._clock = folder, clock or StoreClock(folder)
        self.plan: SearchPlan = read_plan(folder)
        self._trials = [
            _Followed(_beside(folder, trial.run), trial, self.plan.metric, self._clock) for trial in self.plan.trials
        ]
        self._settings = run_config(folder).sweep.settings

    def read(self) -> SweepStatus:
        trials = self._comparable([followed.read() for followed in self._trials])
        best = best_trial(trials, self.plan.metric)
        counted = {
            status.number: {step: value for step, value in followed.curve.items() if math.isfinite(value)}
            for followed, status in zip(self._trials, trials, strict=True)
            if status.state != "failed" and not status.other_data
        }
        state = self._state(trials)
        ended = state not in ("running", "silent")
        return SweepStatus(
            self._folder.uri,
            state,
            self.plan.metric.name,
            self.plan.metric.mode,
            trials,
            best.number if best else None,
            sensitivities(self._settings, self.plan.trials, counted) if ended else [],
            self._next(state, best),
        )

    def _comparable(self, trials: list[TrialStatus]) -> list[TrialStatus]:
        """Return the trials. Some lose their value because their data is another than the first trial's.

        They were evaluated on other data, or trained on other data than the first trial whose settings ask for the
        same.
        """
        first = dict[tuple[str, ...], str]()

        def is_of_other(trial: TrialStatus, scores: Scores) -> bool:
            # Trials that try settings of the data have other data by intention. So each such choice has a first trial
            # of its own.
            asked = (
                f"{name} {word(value)}" for name, value in trial.settings.items() if not name.startswith(_SAME_DATA)
            )
            places = {(scores.of_data,): scores.of_data, (TRAIN, *asked): TRAIN}
            found = [(place, key) for place, of in places.items() if (key := scores.data.get(of))]
            return any(first.setdefault(place, key) != key for place, key in found)

        return [
            replace(trial, value=None, other_data=True) if is_of_other(trial, followed.scores) else trial
            for trial, followed in zip(trials, self._trials, strict=True)
        ]

    def _state(self, trials: list[TrialStatus]) -> SweepState:
        owner = last_owner(self._folder)
        if owner is not None and owner.is_alive(self._clock):
            return "running"
        if all(trial.state in OVER for trial in trials):
            return "finished"
        return "stopped" if owner is None or owner.ended else "silent"

    def _next(self, state: SweepState, best: TrialStatus | None) -> str:
        if state in ("stopped", "silent"):
            return command("resume", self._folder).strip("`")
        if state == "finished" and best is not None:
            return command("export", _beside(self._folder, best.run), "adapter/").strip("`")
        return ""


def _beside(folder: Store, run: str) -> Store:
    return store_of(folder).sub(run)


class _Followed:
    """One trial of a sweep, as its folder describes it. A trial that is over is not read again."""

    def __init__(self, folder: Store, trial: Trial, metric: Metric, clock: Callable[[], float]) -> None:
        self._run, self._trial = folder, trial
        self._follower, self.scores = Follower(folder, clock), Scores(folder, metric)
        self._last: TrialStatus | None = None
        self.curve: dict[int, float] = {}

    def read(self) -> TrialStatus:
        if self._last is not None and self._last.state in OVER:
            return self._last
        run = self._follower.read()
        self.curve = self.scores.read() or self.curve
        step = max(self.curve, default=None)
        value = math.nan if step is None else self.curve[step]
        state = trial_state(self._run, run)
        self._last = TrialStatus(
            self._trial.number,
            self._trial.run,
            self._trial.settings,
            state,
            run.step,
            run.total_steps,
            value if math.isfinite(value) else None,
            step,
            run.last_commit_step,
            self._reason(run) if state == STOPPED_EARLY else run.reason,
        )
        return self._last

    def _reason(self, run: RunStatus) -> str:
        """Return the words of the request that ended the trial early. Its ranks may have ended before reading it."""
        asked = read_stop(self._run)
        return run.reason if asked is None or asked.reason in run.reason else f"stopped {asked.reason}"


def trial_state(folder: Store, status: RunStatus) -> str:
    """Return the state of the trial in the folder `folder`, whose run is in this `status`; see `TrialStatus`."""
    if status.state == "starting" and not status.generation and not status.reason:
        return "waiting"
    return STOPPED_EARLY if status.state == "stopped" and stop_requester(folder) == EARLY else status.state


def best_trial(trials: list[TrialStatus], metric: Metric) -> TrialStatus | None:
    """Return the trial with the best last figure.

    Training losses of different steps have different rows. So by the training loss only finished trials count, as soon
    as there are any.
    """
    counted = [trial for trial in trials if trial.state != "failed" and trial.value is not None]
    if metric.of == TRAIN:
        counted = [trial for trial in counted if trial.state == "finished"] or counted
    sign = 1 if metric.mode == "min" else -1
    return min(counted, key=lambda trial: sign * (trial.value or 0.0), default=None)


def render_sweep(status: SweepStatus) -> RenderableType:
    """Return a table of the trials, and below it the best one.

    Once the sweep has ended, the sensitivities and the next command follow.
    """
    table = FoldedTable(title=f"{status.sweep}: {status.state}", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("trial", *status.settings, "state", "step", status.metric):
        table.add_column(name, justify="left" if name == "state" else "right")
    for trial in status.trials:
        values = (word(trial.settings[name]) for name in status.settings)
        cells = (str(trial.number), *values, trial.state, _steps(trial), _value(trial))
        style = "bold green" if trial.number == status.best else "dim" if trial.state == "waiting" else ""
        table.add_row(*map(Text, cells), style=style)
    return Group(table, *(Text(line, overflow="fold") for line in summary(status)))


def summary(status: SweepStatus) -> list[str]:
    """Return the sweep in a few lines.

    They say how many trials are in which state, which is the best, what the metric depends on, and what to do next.
    """
    lines = [", ".join(f"{count} {state}" for state, count in status.counts().items())]
    best = status.best_trial
    if best is not None and best.value is not None:
        where = f"{status.metric} {best.value:.4f} at step {best.value_step:,}"
        lines.append(
            f"best{'' if status.state == 'finished' else ' so far'}: {best.run} ({trial_in_words(best.settings)}),"
            f" {where}"
        )
    if others := [trial.run for trial in status.trials if trial.other_data]:
        lines.append(
            f"{', '.join(others)}: trained or evaluated on other data than the first trial, as a file was changed in"
            f" between, so {status.metric} does not compare"
        )
    lines += [one.sentence(status.metric) for one in status.sensitivity]
    lines += [f"next: {status.next}"] if status.next else []
    return lines


def watch_sweep(folder: Store, wait: Callable[[float], bool], live: bool, log: Callable[[str], None]) -> None:
    """Show the sweep again and again, with `live` as a table on stderr, else by lines for `log`.

    `wait` takes the seconds to the next look, and tells whether that is the last one.
    """
    follower, before, shown = SweepFollower(folder), None, facts()
    pause = max(_LOOK_SECONDS, poll_seconds(folder))
    with Live(console=Terminal(stderr=True), auto_refresh=False) if live else nullcontext() as view:
        last = False
        while not last:
            last = wait(pause)
            try:
                now = follower.read()
                if view is not None:
                    view.update(shown := render_sweep(now), refresh=True)
                else:
                    for line in changes_since(before, now):
                        log(line)
                before = now
            except StorageError as error:  # the trials themselves are patient with the store
                if view is not None:
                    view.update(outdated(shown, error), refresh=True)


def while_it_runs(folder: Store) -> Callable[[float], bool]:
    """Return a `wait` for `watch_sweep` that ends when the sweep's process has ended."""

    clock = StoreClock(folder)

    def wait(seconds: float) -> bool:
        time.sleep(seconds)
        with suppress(StorageError):  # the sweep itself is patient with the store
            owner = last_owner(folder)
            return owner is None or not owner.is_alive(clock)
        return False

    return wait


def changes_since(before: SweepStatus | None, now: SweepStatus) -> list[str]:
    """Return a line for each trial whose state has changed, for logs that cannot be redrawn."""
    known = {trial.number: trial.state for trial in before.trials} if before else {}
    lines = []
    for trial in now.trials:
        if trial.state == known.get(trial.number, "waiting"):
            continue
        value = "" if trial.value is None else f", {now.metric} {trial.value:.4f}"
        step = f" at step {_steps(trial)}{value}" if trial.step else ""
        lines.append(
            f"{trial.run} ({trial_in_words(trial.settings)}):"
            f" {trial.state}{step}{f': {trial.reason}' if trial.state == 'failed' else ''}"
        )
    return lines


def _steps(trial: TrialStatus) -> str:
    if not trial.step and trial.total_steps is None:
        return ""
    return of_total(trial.step, trial.total_steps)


def _value(trial: TrialStatus) -> str:
    if trial.value is not None:
        return f"{trial.value:.4f}"
    if trial.other_data:
        return "other data"
    return "" if trial.value_step is None else "not finite"
