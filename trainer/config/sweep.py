"""The settings of a search over other settings: which values are tried, how trials are compared, and when one ends
early.
"""

import difflib
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

from pydantic import field_validator, model_validator

from trainer.config.section import Section, Seed, setting

GRID = "grid"
LOG_UNIFORM = "log_uniform"
TRAIN = "train"
"""The name of the training loss among the metrics."""
_FIXED = ("run.name", "run.store", "cluster.ray.address")
"""Settings that belong to the sweep as a whole; each trial has a name of its own."""
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
"""Such as 1e-5, which is text in YAML 1.1 and a number to whoever writes it."""


class Sweep(Section):
    """The trials of `capstan sweep`. Each trial is a run with other values of some settings."""

    settings: dict[str, Any] = setting(
        {},
        about=(
            "The settings to try, by their dotted names, and their values. grid: [..] tries every value. choice: [..]"
            " takes one of the values at random. uniform, log_uniform and int: [lowest, highest] take a random number"
            " between the bounds, which are included."
        ),
        example={"optim.lr": {"log_uniform": [1e-5, 1e-3]}, "tuning.rank": {"grid": [8, 64]}},
    )
    samples: int | None = setting(
        None,
        about="Number of trials with random values for each combination of the grids. Default: 8.",
        example=16,
        ge=1,
        le=10_000,
        unit="trials",
    )
    metric: str | None = setting(
        None,
        about=(
            "The figure by which trials are compared. eval: the loss on the evaluation data. The name of one of"
            " eval.sets: the loss on this set. train: the training loss, as a mean over ten steps. NAME/MEASURE:"
            " another figure of these records, such as eval/reward_accuracy for preferences. Default: eval if there"
            " is evaluation data, otherwise train."
        ),
        example="general",
        min_length=1,
    )
    mode: Literal["min", "max"] | None = setting(
        None,
        about=(
            "Whether the lowest (min) or the highest (max) metric is the best. Default: min for losses, max for"
            " reward_accuracy and reward_margin. For any other figure you must set it."
        ),
        example="max",
    )
    grace_steps: int | None = setting(
        None,
        about=(
            "End bad trials early (ASHA). Trials are judged after this number of steps, then after reduction_factor"
            " times as many, and so on. Each time, a trial goes on only if it is among the best 1 / reduction_factor"
            " of the trials that have got so far. Default: each trial trains to its end."
        ),
        example=100,
        ge=1,
        unit="steps",
    )
    reduction_factor: int = setting(4, about="See grace_steps.", example=2, ge=2, le=100)
    concurrent: int | None = setting(
        None,
        about="Most trials that train at the same time. Default: as many as fit into the cluster.",
        example=4,
        ge=1,
        unit="trials",
    )
    seed: Seed = setting(0, about="Seed of the random values. (run.seed decides the order of the data.)", example=7)

    @field_validator("settings", mode="before")
    @classmethod
    def _numbers(cls, settings: Any) -> Any:
        return _with_numbers(settings)

    @field_validator("settings")
    @classmethod
    def _kinds(cls, settings: dict[str, Any]) -> dict[str, Any]:
        for name, given in settings.items():
            kind, values = next(iter(given.items())) if isinstance(given, dict) and len(given) == 1 else ("", None)
            if kind not in _CHECKS:
                raise ValueError(
                    f"sweep.settings.{name}: {given!r} is not allowed. Give one of {', '.join(_CHECKS)} and its values."
                    f" Example: {name}: {{grid: [..]}}."
                )
            if lack := _CHECKS[kind](values):
                raise ValueError(f"sweep.settings.{name}.{kind}: {values!r} is not allowed. {lack}")
        return settings

    @model_validator(mode="after")
    def _used(self) -> "Sweep":
        drawn = [name for name, given in self.settings.items() if GRID not in given]
        if self.samples is not None and self.samples > 1 and not drawn:
            raise ValueError(
                f"sweep.samples: {self.samples} would repeat the same trials, as nothing is drawn. Remove it, or draw a"
                " setting with choice, uniform, log_uniform or int."
            )
        return self

    def mismatches(self, known: Collection[str], evaluated: Collection[str], every: int) -> list[str]:
        """A sentence for each setting that the run cannot have tried. `known` are all settings, `evaluated` the names
        of the run's evaluation sets, which it evaluates `every` so many steps."""
        wrong = [
            f"sweep.settings: {name!r} {lack}"
            for name in self.settings
            if (lack := _cannot_be_tried(name, known)) is not None
        ]
        metrics = (*evaluated, TRAIN)
        if self.metric is not None and self.metric.partition("/")[0] not in metrics:
            wrong.append(
                f"sweep.metric: {self.metric!r} is not measured by this run. Allowed: {', '.join(metrics)}, or one of"
                " these and a measure of its records, such as eval/reward_accuracy of preferences."
            )
        if self.grace_steps and self.judged_by(evaluated)[0] != TRAIN and not 0 < every <= self.grace_steps:
            wrong.append(
                f"sweep.grace_steps: {self.grace_steps} steps need an evaluation by then, and the run evaluates"
                f" {f'every {every} steps' if every else 'only at its end'}. Evaluate at least so often, or set"
                " sweep.metric: train."
            )
        return wrong

    def judged_by(self, evaluated: Collection[str]) -> tuple[str, str]:
        """(name of the evaluation set or "train", measure) that trials are compared by."""
        name, _, measure = (self.metric or next(iter(evaluated), TRAIN)).partition("/")
        return name, measure or "loss"


def _with_numbers(given: Any) -> Any:
    if isinstance(given, dict):
        return {key: _with_numbers(value) for key, value in given.items()}
    if isinstance(given, list):
        return [_with_numbers(value) for value in given]
    return float(given) if isinstance(given, str) and _EXPONENT.fullmatch(given) else given


def _cannot_be_tried(name: str, known: Collection[str]) -> str | None:
    if name in _FIXED or name.partition(".")[0] == "sweep":
        return "is the same in all trials of a sweep. Remove it."
    if name in known:
        return None
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"is no setting. {f'Did you mean {close[0]!r}?' if close else 'Give dotted names, such as optim.lr.'}"


def _list(values: Any) -> str | None:
    return None if isinstance(values, list) and values else "Give a list of values. Example: [8, 16, 64]."


def _range(values: Any) -> str | None:
    numbers = isinstance(values, list) and len(values) == 2 and all(_is_number(value) for value in values)
    return None if numbers and values[0] < values[1] else "Give [lowest, highest]. Example: [0.0, 0.1]."


def _positive_range(values: Any) -> str | None:
    return _range(values) or (None if values[0] > 0 else "Both must be above 0. Example: [1.0e-5, 1.0e-3].")


def _whole_range(values: Any) -> str | None:
    whole = _range(values) is None and all(isinstance(value, int) for value in values)
    return None if whole else "Give two whole numbers, [lowest, highest]. Example: [4, 64]."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_CHECKS: Mapping[str, Callable[[Any], str | None]] = {
    GRID: _list,
    "choice": _list,
    "uniform": _range,
    LOG_UNIFORM: _positive_range,
    "int": _whole_range,
}
"""For each kind, a function that returns what is wrong with its values, or None."""
