"""The trials of a sweep: a pure function of its configuration, and their form in its folder.

This file also decides whose turn it is. It describes how much the metric depends on each setting, which is no test of
significance.
"""

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from statistics import StatisticsError, correlation, fmean
from typing import Any, NamedTuple

from launcher.policy.comparable import Metric, metric_of
from trainer.config import Config, Model, assignment, override
from trainer.config.sweep import GRID, LOG_UNIFORM
from trainer.errors import ConfigError

FORMAT = 1
_SAMPLES = 8
_DIGITS = 4
"""A number that was drawn has so many significant digits: it is read, typed and compared by people."""

_TRIES = 1000
"""After so many draws of values that were all tried before, there are no others."""


@dataclass(frozen=True)
class Trial:
    """One trial: the run `run`, with these values of the settings that are tried."""

    number: int
    run: str
    settings: dict[str, Any]


@dataclass(frozen=True)
class SearchPlan:
    """The whole of a sweep, as its folder keeps it.

    It has the metric that compares the trials, the trials, and what is known of each base by `base_key`: the `digest`
    of the samples of its weights and, for a base of the Hub, its `commit`.
    """

    metric: Metric
    trials: list[Trial]
    bases: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])

    def config_of(self, config: Config, trial: Trial) -> Config:
        """Return `trial_config`, at the commit of the Hub that the first trial over its base has."""
        own = trial_config(config, trial)
        commit = self.base_of(own).get("commit")
        return override(own, assignment("model.revision", commit)) if commit else own

    def base_of(self, own: Config) -> dict[str, str]:
        """Return the facts about the base of a trial's configuration; empty for a sweep that keeps none."""
        return self.bases.get(base_key(own.model), {})

    def to_json(self) -> dict[str, Any]:
        trials = [asdict(trial) for trial in self.trials]
        return {"format": FORMAT, "metric": self.metric._asdict(), "trials": trials, "bases": self.bases}

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> "SearchPlan":
        """Read a plan. Raises `LookupError` or `TypeError` for JSON that no version has written."""
        return cls(
            Metric(**given["metric"]), [Trial(**trial) for trial in given["trials"]], dict(given.get("bases", {}))
        )


def base_key(model: Model) -> str:
    """Return a base as the settings name it."""
    return f"{model.base}@{model.revision or ''}"


def planned(config: Config) -> SearchPlan:
    """Return the sweep of `config`. Grids vary fastest, so more samples leave the first trials what they are.

    No two trials have the same values. If there are no more values, there are fewer trials than samples.

    Raises:
        ConfigError: nothing is tried, or the figures of the trials would not compare.
    """
    sweep = config.sweep
    if not sweep.settings:
        raise ConfigError(
            "sweep.settings: missing. Name settings and the values to try. Example: sweep: {settings: {optim.lr: "
            "{log_uniform: [1.0e-5, 1.0e-3]}}}."
        )
    grids = {name: given[GRID] for name, given in sweep.settings.items() if GRID in given}
    drawn = {name: given for name, given in sweep.settings.items() if name not in grids}
    samples = (sweep.samples or _SAMPLES) if drawn else 1
    # Each setting has a stream of its own, so another setting beside it does not change its values.
    streams = {name: _draws(given, random.Random(f"{sweep.seed} {name}")) for name, given in drawn.items()}
    trials: list[Trial] = []
    seen, combinations = set[str](), list(itertools.product(*grids.values()))
    for _ in range(samples):
        for values in list(combinations):  # a copy, because combinations without new values are removed
            fixed = dict(zip(grids, values, strict=True))
            chosen = _new(
                ({**fixed, **{name: next(draw) for name, draw in streams.items()}} for _ in range(_TRIES)), seen
            )
            if chosen is None:
                combinations.remove(values)
                continue
            number = len(trials) + 1
            ordered = {name: chosen[name] for name in sweep.settings}
            trials.append(Trial(number, f"{config.run.name}-{number}", ordered))
    return SearchPlan(metric_of(config, _with_each_objective(config, trials)), trials)


def _with_each_objective(config: Config, trials: list[Trial]) -> list[Config]:
    """Return the configuration with each of the objectives that the trials have.

    There may be thousands of trials with a few objectives.
    """
    tried = [
        {name: value for name, value in trial.settings.items() if name.startswith("objective.")} for trial in trials
    ]
    different = {json.dumps(settings, sort_keys=True): settings for settings in tried}
    return [trial_config(config, Trial(0, config.run.name, settings)) for settings in different.values()]


def _new(drawn: Iterator[dict[str, Any]], seen: set[str]) -> dict[str, Any] | None:
    """Return the first of the values that has not been `seen`, and mark it as seen. None if there is none."""
    for values in drawn:
        key = json.dumps(values, sort_keys=True)
        if key not in seen:
            seen.add(key)
            return values
    return None


def trial_config(config: Config, trial: Trial) -> Config:
    """Return the configuration of the trial's run: that of the sweep with its values, and without the sweep.

    Raises:
        ConfigError: its values are not allowed, or not together; it says which trial.
    """
    values = {"run.name": trial.run, **trial.settings, "sweep": {}}
    try:
        return override(config, *(assignment(name, value) for name, value in values.items()))
    except ConfigError as error:
        raise ConfigError(
            f"sweep.settings: trial {trial.number} ({trial_in_words(trial.settings)}) is not allowed. {error}"
        ) from error


def _draws(given: Mapping[str, Any], draw: random.Random) -> Iterator[Any]:
    ((kind, values),) = given.items()
    while True:
        yield _draw(kind, values, draw)


def _draw(kind: str, values: list[Any], draw: random.Random) -> Any:
    if kind == "choice":
        return draw.choice(values)
    low, high = values
    if kind == "int":
        return draw.randint(low, high)
    logarithmic = kind == LOG_UNIFORM
    number = math.exp(draw.uniform(math.log(low), math.log(high))) if logarithmic else draw.uniform(low, high)
    return min(max(float(f"{number:.{_DIGITS}g}"), low), high)


def trial_in_words(settings: Mapping[str, Any]) -> str:
    """Return the settings of a trial, with names as short as they can be told apart: "lr=0.0002 rank=8"."""
    last = [name.rpartition(".")[2] for name in settings]
    names = [short if last.count(short) == 1 else name for name, short in zip(settings, last, strict=True)]
    return " ".join(f"{name}={word(value)}" for name, value in zip(names, settings.values(), strict=True))


def word(value: Any) -> str:
    """Return a setting's value, as short as people compare it."""
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Candidate:
    """A trial that has not had its turn.

    `makes` are the things in the store that its run needs and runs share: compiled data and quantized bases, by the
    keys of their manifests. A trial that is `done` has only its figures to report.
    """

    number: int
    makes: frozenset[str] = frozenset()
    done: bool = False


class End(NamedTuple):
    """How a trial's run ended. The reason is empty if it finished."""

    exit_code: int
    reason: str


@dataclass
class Turns:
    """The trials that are `waiting` for their turn and those that have it.

    If several trials share something that is not made yet, one goes first, and the others wait until it is there;
    `made` tells. `room` is how many trials like the one of this number the cluster can train at once.
    """

    waiting: list[Candidate]
    made: Callable[[str], bool]
    room: Callable[[int], int]
    running: dict[int, Candidate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Finished trials come first: their figures decide which trials are stopped early from now on.
        self.waiting = sorted(self.waiting, key=lambda trial: (not trial.done, trial.number))

    def next(self) -> int | None:
        """Return the trial to start now. It counts as running from here on. None if all waiting trials have to wait."""
        missing = {thing for trial in self.running.values() for thing in trial.makes if not self.made(thing)}
        training = sum(not trial.done for trial in self.running.values())
        for trial in self.waiting:
            if trial.done or (not trial.makes & missing and training < self.room(trial.number)):
                self.waiting.remove(trial)
                self.running[trial.number] = trial
                return trial.number
        return None

    def ended(self, number: int) -> None:
        self.running.pop(number, None)


_RANGES = ("uniform", "log_uniform", "int")
_FEWEST = 3
"""Two trials have a rank correlation of 1 or -1 whatever is measured."""


@dataclass(frozen=True)
class Sensitivity:
    """The metric of `trials` trials at `step`, by the values of one setting.

    A range has the rank `correlation` (Spearman's) of value and metric; None if the trials do not tell. Single values
    have the `means` of the metric for each, and the `spread`, which is the largest mean minus the smallest.
    """

    setting: str
    trials: int
    step: int
    correlation: float | None = None
    means: list[dict[str, Any]] = field(default_factory=list)
    spread: float | None = None

    def sentence(self, metric: str) -> str:
        where = f"at step {self.step:,}, {self.trials} trials"
        if self.spread is not None:
            means = ", ".join(f"{mean['value']}: {mean['mean']:.4f} ({mean['trials']})" for mean in self.means)
            return f"{self.setting}: means of {metric} differ by {self.spread:.4f} ({means}; {where})"
        if self.correlation is None:
            return f"{self.setting}: too few different trials to tell ({where})"
        way = "rises" if self.correlation > 0 else "falls"
        return f"{self.setting}: {metric} {way} with it, rank correlation {self.correlation:+.2f} ({where})"


def sensitivities(
    settings: Mapping[str, Any], trials: Sequence[Trial], curves: Mapping[int, Mapping[int, float]]
) -> list[Sensitivity]:
    """Return one for each of the sweep's `settings`, the strongest first among those of a kind.

    `curves` has the metric after each step for the numbers of those trials that count. They are compared at the last
    step that all of them have reached. Metrics at different steps would mix the effect of the settings with that of the
    training.
    """
    # Before the first step all trials are the base.
    reached = {trial.number: {step for step in curves.get(trial.number, ()) if step > 0} for trial in trials}
    counted = [trial for trial in trials if reached[trial.number]]
    common = set[int].intersection(*(reached[trial.number] for trial in counted)) if counted else set[int]()
    if not common:
        return []
    step = max(common)
    values = [curves[trial.number][step] for trial in counted]
    found = [
        _of_range(name, [trial.settings[name] for trial in counted], values, step)
        if next(iter(given)) in _RANGES
        else _of_values(name, [trial.settings[name] for trial in counted], values, step)
        for name, given in settings.items()
    ]
    return sorted(found, key=lambda one: (one.spread is None, -(one.spread or abs(one.correlation or 0.0))))


def _of_range(name: str, given: list[Any], metric: list[float], step: int) -> Sensitivity:
    found = None
    if len(given) >= _FEWEST:
        with suppress(StatisticsError):  # all values are the same
            found = correlation(_ranks(given), _ranks(metric))
    return Sensitivity(name, len(given), step, correlation=found)


def _of_values(name: str, given: list[Any], metric: list[float], step: int) -> Sensitivity:
    groups: dict[str, list[float]] = {}
    for value, figure in zip(given, metric, strict=True):
        groups.setdefault(value if isinstance(value, str) else json.dumps(value), []).append(figure)
    means = [{"value": value, "mean": fmean(group), "trials": len(group)} for value, group in groups.items()]
    found = [mean["mean"] for mean in means]
    return Sensitivity(name, len(given), step, means=means, spread=max(found) - min(found))


def _ranks(values: Sequence[float]) -> list[float]:
    """Return ranks from 0. Equal values share the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]
