"""The page that compares several runs: how they ended side by side, the settings that differ, and their curves over each other."""

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.report.figures import RunFigures
from launcher.report.page import measure_of, rendered
from launcher.report.plots import Plot, Series, lines
from trainer.run.settings import leaves

_COMPARED = ("loss", "lr", "grad_norm", "tokens_per_second", "mfu", "device_peak_bytes", "expert_load")


def comparison_page(runs: Sequence[RunFigures]) -> str:
    """The whole HTML file, for runs of any number."""
    names = distinct_names(runs)
    return rendered(
        "comparison.html.j2",
        {"runs": [run.to_json() for run in runs]},
        runs=list(zip(names, runs, strict=True)),
        held_out=sorted({of for run in runs for of in run.held_out.get("loss", {})}),
        differing=differing_settings(runs),
        plots=comparison_plots(dict(zip(names, runs, strict=True))),
    )


def distinct_names(runs: Sequence[RunFigures]) -> list[str]:
    """The names of the runs; the whole place of those that share one."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else run.run for run in runs]


def differing_settings(runs: Sequence[RunFigures]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, each with its value in every run; name and place of the run are left out."""
    every = [dict(leaves(run.settings)) for run in runs]
    names = {name: None for settings in every for name in settings}
    values = {name: [settings.get(name) for settings in every] for name in names if not name.startswith("run.name")}
    return {name: of for name, of in values.items() if any(value != of[0] for value in of) and name != "run.store"}


def comparison_plots(runs: Mapping[str, RunFigures]) -> list[Plot]:
    """The same measure of all runs in one plot: where a run has more steps than can be shown, its means."""
    plots = [_overlaid(runs, name) for name in _COMPARED]
    for of in sorted({of for run in runs.values() for of in run.held_out.get("loss", {})}):
        series = [Series(name, run.held_out.get("loss", {}).get(of, [])) for name, run in runs.items()]
        plots.insert(1, lines(f"Held-out loss{f': {of}' if of else ''}", series, unit="nats"))
    return [plot for plot in plots if plot]


def _overlaid(runs: Mapping[str, RunFigures], name: str) -> Plot | None:
    measure = measure_of(name)
    curves = {run: curve for run, figures in runs.items() if (curve := figures.curves.get(name))}
    series = [Series(run, measure.scaled(curve.means or curve.points)) for run, curve in curves.items()]
    note = "Means of stretches of steps" if any(curve.means for curve in curves.values()) else ""
    return lines(measure.title, series, unit=measure.unit, note=note)
