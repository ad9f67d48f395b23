"""The trials of a sweep, as a pure function of its configuration, and their form in its folder."""

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

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
    """The whole of a sweep, as its folder keeps it: by which metric its trials are compared, which they are, and what
    is known of each base that they have, by `base_key`: the `digest` of its weights' samples and, of one of the Hub,
    its `commit`."""

    metric: Metric
    trials: list[Trial]
    bases: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])

    def config_of(self, config: Config, trial: Trial) -> Config:
        """`trial_config`, at the commit of the Hub that the first trial over its base has."""
        own = trial_config(config, trial)
        commit = self.base_of(own).get("commit")
        return override(own, assignment("model.revision", commit)) if commit else own

    def base_of(self, own: Config) -> dict[str, str]:
        """The facts about the base of a trial's configuration; empty for a sweep that keeps none."""
        return self.bases.get(base_key(own.model), {})

    def to_json(self) -> dict[str, Any]:
        trials = [asdict(trial) for trial in self.trials]
        return {"format": FORMAT, "metric": self.metric._asdict(), "trials": trials, "bases": self.bases}

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> "SearchPlan":
        """Raises `LookupError` or `TypeError` for what no version has written."""
        return cls(
            Metric(**given["metric"]), [Trial(**trial) for trial in given["trials"]], dict(given.get("bases", {}))
        )


def base_key(model: Model) -> str:
    """A base as the settings name it."""
    return f"{model.base}@{model.revision or ''}"


def planned(config: Config) -> SearchPlan:
    """The sweep of `config`. Grids vary fastest, so that more samples leave the first trials what they are.

    No two trials have the same values: where there are no more, there are fewer trials than samples.

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
    # A stream of its own for each setting: another setting beside it does not change its values.
    streams = {name: _draws(given, random.Random(f"{sweep.seed} {name}")) for name, given in drawn.items()}
    trials: list[Trial] = []
    seen, combinations = set[str](), list(itertools.product(*grids.values()))
    for _ in range(samples):
        for values in list(combinations):  # a copy, as those without new values are removed
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
    """The configuration with each of the objectives that the trials have: there may be thousands of trials with a few
    of these.
    """
    tried = [
        {name: value for name, value in trial.settings.items() if name.startswith("objective.")} for trial in trials
    ]
    different = {json.dumps(settings, sort_keys=True): settings for settings in tried}
    return [trial_config(config, Trial(0, config.run.name, settings)) for settings in different.values()]


def _new(drawn: Iterator[dict[str, Any]], seen: set[str]) -> dict[str, Any] | None:
    """The first of the values that has not been `seen`, as it is from now on; None if there is none."""
    for values in drawn:
        key = json.dumps(values, sort_keys=True)
        if key not in seen:
            seen.add(key)
            return values
    return None


def trial_config(config: Config, trial: Trial) -> Config:
    """The configuration of the trial's run: that of the sweep with its values, and without the sweep.

    Raises:
        ConfigError: its values are not allowed, or not together; it says which trial.
    """
    values = {"run.name": trial.run, **trial.settings, "sweep": {}}
    try:
        return override(config, *(assignment(name, value) for name, value in values.items()))
    except ConfigError as error:
        raise ConfigError(
            f"sweep.settings: trial {trial.number} ({in_words(trial.settings)}) is not allowed. {error}"
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


def in_words(settings: Mapping[str, Any]) -> str:
    """The settings of a trial, with names as short as they can be told apart: "lr=0.0002 rank=8"."""
    last = [name.rpartition(".")[2] for name in settings]
    names = [short if last.count(short) == 1 else name for name, short in zip(settings, last, strict=True)]
    return " ".join(f"{name}={word(value)}" for name, value in zip(names, settings.values(), strict=True))


def word(value: Any) -> str:
    """A setting's value, as short as people compare it."""
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
