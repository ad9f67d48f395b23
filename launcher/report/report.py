"""The report of one run, of several, or of a sweep: where it is stored, what `--json` prints, the pages that compare.

Several runs are shown with the settings that differ, and with their curves over each other. Trials of a sweep are shown
with how the metric depends on each setting. page.py has the page of one run.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from launcher.policy.trials import word
from launcher.report.figures import EvaluationFigures, RunFigures, read_figures
from launcher.report.history import Point
from launcher.report.page import measure_of, rendered, run_page
from launcher.report.plots import BEST, GREY, PLAIN, Axis, Line, Plot, Series, lines, parallel
from launcher.report.trained import read_seen
from launcher.view.sweep import STOPPED_EARLY, SweepStatus, TrialStatus, is_sweep, read_sweep, trial_folders
from trainer.config.evaluation import UNNAMED, split_of
from trainer.config.sweep import LOG_UNIFORM
from trainer.errors import StorageError
from trainer.run import layout
from trainer.run.folder import command, leaves, run_config, store_of
from trainer.run.owner import StoreClock
from trainer.run.records import generations
from trainer.store.store import Store

_LOSS = "loss"
_COMPARED = ("lr", "grad_norm", "tokens_per_second", "mfu", "device_peak_bytes", "expert_load")
_OVERLAID = 7
"""Trials whose curves are drawn over each other: as many as have colours of their own."""
_FEW = 6
"""So many values of a setting have a tick each."""
_DECADES = 100
"""Values of a setting that are so many times apart are on a logarithmic axis, however they were drawn."""


@dataclass(frozen=True)
class Report:
    """The figures of a report, as `--json` prints them, and its `page`, which takes a moment to draw."""

    figures: dict[str, Any]
    page: Callable[[], str]


def read_report(folders: Sequence[Store]) -> Report:
    """Return a report of the run or the sweep in one folder, or one that compares the runs in several folders.

    The trials of sweeps are among these runs. Raises `StorageError` when one cannot be read.
    """
    if len(folders) == 1 and is_sweep(folders[0]):
        sweep = read_sweep_figures(folders[0])
        return Report({"sweep": sweep.to_json()}, partial(sweep_page, sweep))
    every = [run for folder in folders for run in (trial_folders(folder) if is_sweep(folder) else [folder])]
    runs = [read_figures(run) for run in every]
    page = partial(_run_page, every[0], runs[0]) if len(runs) == 1 else partial(comparison_page, runs)
    return Report({"runs": [figures.to_json() for figures in runs]}, page)


def _run_page(folder: Store, figures: RunFigures) -> str:
    return run_page(figures, read_seen(folder, figures.data))


def target_of(folders: Sequence[Store], output: Path | None) -> str:
    """Return the file for the page: `output`, else one in the folder of a single run, or in this directory."""
    if output is None and len(folders) == 1:
        return f"{folders[0].uri.removeprefix('file://')}/{layout.REPORT}"
    return str(output or layout.REPORT)


def write_report(folders: Sequence[Store], output: Path | None = None) -> Report:
    """Write the page to `target_of` the runs.

    Raises `StorageError` when a run cannot be read, or the page cannot be written.
    """
    report = read_report(folders)
    if output is None and len(folders) == 1:
        folders[0].put(layout.REPORT, report.page().encode())
        return report
    target = Path(target_of(folders, output))
    page = report.page()
    try:
        _write(target, page)
    except OSError as error:
        raise StorageError(f"-o: {target} cannot be written: {error.strerror}. Name another file.") from error
    return report


def _write(target: Path, text: str) -> None:
    """Write the whole page or nothing: if the disk is full, the old page stays.

    Something that is no file, such as /dev/stdout, is written to directly.
    """
    if target.exists() and not target.is_file():
        target.write_text(text, encoding="utf-8")
        return
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(target)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def keep_report(folder: Store, log: Callable[[str], None]) -> None:
    """Write the page of a run or a sweep that has ended into its folder.

    A failure is reported, and never decides how the run ends.
    """
    try:
        if is_sweep(folder) or generations(folder):
            write_report([folder])
            log(f"the report is {target_of([folder], None)}")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        log(
            f"the report could not be written, which does not end the run: {reason}. {command('report', folder)} tries"
            " again."
        )


def comparison_page(runs: Sequence[RunFigures]) -> str:
    """Return the whole HTML file, for runs of any number."""
    tree, values = comparison_values(runs)
    return rendered("comparison.html.j2", tree, **values)


def comparison_values(runs: Sequence[RunFigures]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the figures that comparison.html.j2 shows, and its other values."""
    names = distinct_names(runs)
    named = dict(zip(names, runs, strict=True))
    held_out = _held_out(runs)
    return {"runs": [run.to_json() for run in runs]}, {
        "runs": list(named.items()),
        "held_out": held_out,
        "measured": _measured([run.evaluations[-1] for run in runs if run.evaluations]),
        "apart": [of or "the data without a name" for of in held_out if len(_by_data(named, of)) > 1],
        "differing": differing_settings(runs),
        "plots": comparison_plots(named),
    }


def _measured(evaluations: Sequence[EvaluationFigures]) -> dict[str, Any] | None:
    """Return the names of the sets and the (task, metric) that any of `evaluations` has; None without any."""
    sets = sorted({name for one in evaluations for name in one.sets})
    tasks = sorted({(task, metric) for one in evaluations for task, of in one.tasks.items() for metric in of})
    return {"sets": sets, "tasks": tasks} if sets or tasks else None


def _held_out(runs: Iterable[RunFigures]) -> list[str]:
    """Return the names of the data that any of them has evaluated."""
    return sorted({of for run in runs for of in run.held_out.get(_LOSS, {})})


def distinct_names(runs: Sequence[RunFigures]) -> list[str]:
    """Return the names of the runs. Runs that share a name get their whole place instead."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else run.run for run in runs]


def differing_settings(runs: Sequence[RunFigures]) -> dict[str, list[str]]:
    """Return the settings that are not the same in all runs, each with its value in every run, in words.

    Name and place of the run are left out.
    """
    every = [dict(leaves(run.settings)) for run in runs]
    names = {name: None for settings in every for name in settings}
    values = {name: [settings.get(name) for settings in every] for name in names if not name.startswith("run.name")}
    differing = {name: of for name, of in values.items() if any(value != of[0] for value in of) and name != "run.store"}
    return {name: ["" if value is None else word(_set(value)) for value in of] for name, of in differing.items()}


def _set(value: Any) -> Any:
    """Return a value as a person would write it.

    Lists of sections lack what is not set in them. A section with only a path is the path.
    """
    if isinstance(value, list):
        return [_set(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    given = {name: _set(one) for name, one in value.items() if one not in (None, {}, [])}
    return given["path"] if given in ({"path": given.get("path")}, {"path": given.get("path"), "weight": 1}) else given


def comparison_plots(runs: Mapping[str, RunFigures]) -> list[Plot]:
    """Plot the same measure of all runs together. A run with more steps than can be shown has its means."""
    plots = [_overlaid(some, _LOSS, words) for words, some in _by_objective(runs).items()]
    for of in _held_out(runs.values()):
        # A named set has the likelihood of its tokens. The loss of the data without a name is the objective's.
        for words, some in ({"": runs} if of else _by_objective(runs)).items():
            for data, alike in _by_data(some, of).items():
                series = [Series(name, run.held_out.get(_LOSS, {}).get(of, [])) for name, run in alike.items()]
                title = ": ".join(filter(None, ("Held-out loss", of, words, data)))
                plots.append(lines(title, series, unit="nats"))
    plots += [_overlaid(runs, name) for name in _COMPARED]
    return [plot for plot in plots if plot]


def _by_data(runs: Mapping[str, RunFigures], of: str) -> dict[str, dict[str, RunFigures]]:
    """Return the runs whose set `of` has the same documents, by the first of them; without words if all have."""
    split, groups = split_of(of or UNNAMED), dict[str, dict[str, RunFigures]]()
    for name, run in runs.items():
        data = next((found.fingerprint for found in run.data if found.split == split), "")
        groups.setdefault(data, {})[name] = run
    return {f"data of {next(iter(some))}": some for some in groups.values()} if len(groups) > 1 else {"": dict(runs)}


def _by_objective(runs: Mapping[str, RunFigures]) -> dict[str, dict[str, RunFigures]]:
    """Return the runs whose losses have the same formula, by its words; without words if all have."""
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


@dataclass(frozen=True)
class SweepFigures:
    """A sweep now, and the figures of its best trials, the best first.

    `logarithmic` are the settings that are drawn on a logarithmic scale.
    """

    made: float
    status: SweepStatus
    best: list[RunFigures]
    logarithmic: Collection[str]

    def to_json(self) -> dict[str, Any]:
        best = [figures.to_json() for figures in self.best]
        return {"made": self.made, **asdict(self.status), "best_runs": best}


def read_sweep_figures(folder: Store, clock: Callable[[], float] | None = None) -> SweepFigures:
    """Read a sweep's figures. `clock` is the store's by default.

    Raises `StorageError` when the store cannot be read, and `ConfigError` if the folder is no sweep's.
    """
    clock = clock or StoreClock(folder)
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
    """Return the whole HTML file."""
    return rendered("sweep.html.j2", figures.to_json(), **sweep_values(figures))


def sweep_values(figures: SweepFigures, links: str = "") -> dict[str, Any]:
    """Return what sweep.html.j2 shows, beside the figures. The address of a trial's page is `links` and its name."""
    status = figures.status
    by_setting = (_by_setting(status, name, logarithmic=name in figures.logarithmic) for name in status.settings)
    return {
        "sweep": status,
        "name": status.sweep.rpartition("/")[2],
        "settings": status.settings,
        "best": status.best_trial,
        "by_setting": [plot for plot in by_setting if plot],
        "together": parallel(
            "Trials over their settings",
            [*status.settings, status.metric],
            [_line(status, trial) for trial in status.trials],
            list(figures.logarithmic),
        ),
        "plots": comparison_plots({run.name: run for run in figures.best}),
        "shown": len(figures.best),
        "links": links,
    }


def _line(status: SweepStatus, trial: TrialStatus) -> Line:
    """Return the line of a trial over the parallel axes: grey if it was ended early or failed."""
    css = BEST if trial.number == status.best else GREY if trial.state in (STOPPED_EARLY, "failed") else PLAIN
    return Line(trial.run, {**trial.settings, status.metric: trial.value}, css)


def _by_setting(status: SweepStatus, name: str, *, logarithmic: bool) -> Plot | None:
    """Plot the metric of every trial at its last step over a setting, by the trials' states.

    None if its values are no numbers.
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
    """Return whether three or more rising values grow by one factor, as 8, 16, 32 do."""
    factors = [later / earlier for earlier, later in pairwise(values)]
    return len(factors) > 1 and all(math.isclose(factor, factors[0], rel_tol=1e-6) for factor in factors)
