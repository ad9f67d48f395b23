"""The page that compares several runs: how they ended side by side, the settings that differ, and their curves over
each other.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launcher.policy.trials import word
from launcher.report.figures import RunFigures
from launcher.report.page import measure_of, rendered
from launcher.report.plots import Plot, Series, lines
from trainer.config.evaluation import UNNAMED, split_of
from trainer.run.settings import leaves

_LOSS = "loss"
_COMPARED = ("lr", "grad_norm", "tokens_per_second", "mfu", "device_peak_bytes", "expert_load")


def comparison_page(runs: Sequence[RunFigures]) -> str:
    """The whole HTML file, for runs of any number."""
    names = distinct_names(runs)
    named = dict(zip(names, runs, strict=True))
    held_out = _held_out(runs)
    return rendered(
        "comparison.html.j2",
        {"runs": [run.to_json() for run in runs]},
        runs=list(named.items()),
        held_out=held_out,
        apart=[of or "the data without a name" for of in held_out if len(_by_data(named, of)) > 1],
        differing=differing_settings(runs),
        plots=comparison_plots(named),
    )


def _held_out(runs: Iterable[RunFigures]) -> list[str]:
    """The names of the data that any of them has evaluated."""
    return sorted({of for run in runs for of in run.held_out.get(_LOSS, {})})


def distinct_names(runs: Sequence[RunFigures]) -> list[str]:
    """The names of the runs; the whole place of those that share one."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else run.run for run in runs]


def differing_settings(runs: Sequence[RunFigures]) -> dict[str, list[str]]:
    """The settings that are not the same in all runs, each with its value in every run, in words; name and place of the
    run are left out."""
    every = [dict(leaves(run.settings)) for run in runs]
    names = {name: None for settings in every for name in settings}
    values = {name: [settings.get(name) for settings in every] for name in names if not name.startswith("run.name")}
    differing = {name: of for name, of in values.items() if any(value != of[0] for value in of) and name != "run.store"}
    return {name: ["" if value is None else word(_set(value)) for value in of] for name, of in differing.items()}


def _set(value: Any) -> Any:
    """A value as somebody would write it: lists of sections without what is not set in them, and those of a path alone
    as the path.
    """
    if isinstance(value, list):
        return [_set(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    given = {name: _set(one) for name, one in value.items() if one not in (None, {}, [])}
    return given["path"] if given in ({"path": given.get("path")}, {"path": given.get("path"), "weight": 1}) else given


def comparison_plots(runs: Mapping[str, RunFigures]) -> list[Plot]:
    """The same measure of all runs in one plot: where a run has more steps than can be shown, its means."""
    plots = [_overlaid(some, _LOSS, words) for words, some in _by_objective(runs).items()]
    for of in _held_out(runs.values()):
        # A named set has the likelihood of its tokens; the loss of the data without a name is the objective's.
        for words, some in ({"": runs} if of else _by_objective(runs)).items():
            for data, alike in _by_data(some, of).items():
                series = [Series(name, run.held_out.get(_LOSS, {}).get(of, [])) for name, run in alike.items()]
                title = ": ".join(filter(None, ("Held-out loss", of, words, data)))
                plots.append(lines(title, series, unit="nats"))
    plots += [_overlaid(runs, name) for name in _COMPARED]
    return [plot for plot in plots if plot]


def _by_data(runs: Mapping[str, RunFigures], of: str) -> dict[str, dict[str, RunFigures]]:
    """The runs whose set `of` has the same documents, by the first of them; without words where all are."""
    split, groups = split_of(of or UNNAMED), dict[str, dict[str, RunFigures]]()
    for name, run in runs.items():
        data = next((found.fingerprint for found in run.data if found.split == split), "")
        groups.setdefault(data, {})[name] = run
    return {f"data of {next(iter(some))}": some for some in groups.values()} if len(groups) > 1 else {"": dict(runs)}


def _by_objective(runs: Mapping[str, RunFigures]) -> dict[str, dict[str, RunFigures]]:
    """The runs whose losses are of one formula, by its words; without words where all are."""
    tried = {name: {"name": "sft", **_set(run.settings.get("objective") or {})} for name, run in runs.items()}
    groups: dict[str, dict[str, RunFigures]] = {}
    for name, objective in tried.items():
        different = {
            key: value for key, value in objective.items() if any(other.get(key) != value for other in tried.values())
        }
        groups.setdefault(", ".join(f"{key} {word(value)}" for key, value in different.items()), {})[name] = runs[name]
    return groups if len(groups) > 1 else {"": dict(runs)}


def _overlaid(runs: Mapping[str, RunFigures], name: str, words: str = "") -> Plot | None:
    measure = measure_of(name)
    curves = {run: curve for run, figures in runs.items() if (curve := figures.curves.get(name))}
    series = [Series(run, measure.scaled(curve.means or curve.points)) for run, curve in curves.items()]
    note = "Means of stretches of steps" if any(curve.means for curve in curves.values()) else ""
    return lines(f"{measure.title}: {words}" if words else measure.title, series, unit=measure.unit, note=note)
