"""How much the metric of a sweep depends on each setting: a plain description of its trials, and no test of
significance.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import StatisticsError, correlation, fmean
from typing import Any

from launcher.policy.trials import Trial

_RANGES = ("uniform", "log_uniform", "int")
_FEWEST = 3
"""Two trials have a rank correlation of 1 or -1 whatever is measured."""


@dataclass(frozen=True)
class Sensitivity:
    """The metric of `trials` trials at `step`, by the values of one setting.

    A range has the rank `correlation` (Spearman's) of value and metric, None where the trials do not tell. Single
    values have the `means` of the metric for each, and the `spread`, which is the largest mean less the smallest.
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
    """One for each of the sweep's `settings`, the strongest first among those of a kind.

    `curves` has the metric after each step for the numbers of those trials that count. They are compared at the last
    step that all of them have reached: a metric before it and one behind it would not tell the settings apart from the
    training.
    """
    # Before the first step all are the base.
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
    """Ranks from 0; equal values share the mean of theirs."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]
