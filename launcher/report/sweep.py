"""The page of a sweep: its trials side by side, how the metric depends on each setting, and the best trials' curves."""

import math
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from launcher.report.comparison import comparison_plots
from launcher.report.curves import Point
from launcher.report.figures import RunFigures, read_figures
from launcher.report.page import rendered
from launcher.report.plots import Axis, Plot, Series, lines
from launcher.view.sweep import SweepStatus, TrialStatus, read_sweep
from trainer.config.sweep import LOG_UNIFORM
from trainer.run.folder import run_config, store_of
from trainer.store.store import Store

_OVERLAID = 7
"""Trials whose curves are drawn over each other: as many as have colours of their own."""
_FEW = 6
"""So many values of a setting have a tick each."""
_DECADES = 100
"""Values of a setting that are so many times apart are on a logarithmic axis, however they were drawn."""


@dataclass(frozen=True)
class SweepFigures:
    """A sweep now, and the figures of its best trials, the best first. `logarithmic` are the settings that are drawn
    so.
    """

    made: float
    status: SweepStatus
    best: list[RunFigures]
    logarithmic: Collection[str]

    def to_json(self) -> dict[str, Any]:
        best = [figures.to_json() for figures in self.best]
        return {"made": self.made, **asdict(self.status), "best_runs": best}


def read_sweep_figures(folder: Store, clock: Callable[[], float] = time.time) -> SweepFigures:
    """Raises `StorageError` when the store cannot be read, and `ConfigError` where the folder is no sweep's."""
    status = read_sweep(folder, clock)
    store, tried = store_of(folder), run_config(folder).sweep.settings
    best = [read_figures(store.sub(trial.run), clock) for trial in _ranked(status)]
    return SweepFigures(clock(), status, best, [name for name, given in tried.items() if LOG_UNIFORM in given])


def _ranked(status: SweepStatus) -> list[TrialStatus]:
    sign = 1 if status.mode == "min" else -1
    told = [trial for trial in status.trials if trial.value is not None]
    others = sorted(told, key=lambda trial: (trial.number != status.best, sign * (trial.value or 0.0)))
    return others[:_OVERLAID]


def sweep_page(figures: SweepFigures) -> str:
    """The whole HTML file."""
    status = figures.status
    by_setting = (_by_setting(status, name, logarithmic=name in figures.logarithmic) for name in status.settings)
    return rendered(
        "sweep.html.j2",
        figures.to_json(),
        sweep=status,
        name=status.sweep.rpartition("/")[2],
        settings=status.settings,
        best=status.best_trial,
        by_setting=[plot for plot in by_setting if plot],
        plots=comparison_plots({run.name: run for run in figures.best}),
        shown=len(figures.best),
    )


def _by_setting(status: SweepStatus, name: str, *, logarithmic: bool) -> Plot | None:
    """The metric of every trial at its last step over a setting, by the trials' states. None where its values are no
    numbers.
    """
    groups: dict[str, list[Point]] = {}
    for trial in status.trials:
        value = trial.settings[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or trial.value is None:
            continue
        groups.setdefault(trial.state, []).append((float(value), trial.value))
    every = sorted({x for points in groups.values() for x, _ in points})
    spread = bool(every) and every[0] > 0 and (every[-1] / every[0] >= _DECADES or _is_geometric(every))
    log = logarithmic or spread
    axis = Axis(name, log=log, ticks=every if len(every) <= _FEW else ())
    series = [Series(state, points, "dots") for state, points in groups.items()]
    return lines(f"By {name}", series, unit=status.metric, x=axis)


def _is_geometric(values: list[float]) -> bool:
    """Whether three or more rising values grow by one factor, as 8, 16, 32 do."""
    factors = [later / earlier for earlier, later in pairwise(values)]
    return len(factors) > 1 and all(math.isclose(factor, factors[0], rel_tol=1e-6) for factor in factors)
