"""The report of one run, of several, or of a sweep: where it is stored, and what `--json` prints of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from launcher.report.comparison import comparison_page, read_sweep_figures, sweep_page
from launcher.report.figures import read_figures
from launcher.report.page import run_page
from launcher.view.sweep import is_sweep, trial_folders
from trainer.errors import StorageError
from trainer.run import layout
from trainer.run.folder import command
from trainer.run.records import generations
from trainer.store.store import Store


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
    page = partial(run_page, runs[0]) if len(runs) == 1 else partial(comparison_page, runs)
    return Report({"runs": [figures.to_json() for figures in runs]}, page)


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
