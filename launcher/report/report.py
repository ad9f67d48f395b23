"""The report of one run or of several: where it is kept, and what `--json` tells of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.report.comparison import comparison_page
from launcher.report.figures import RunFigures, read_figures
from launcher.report.page import run_page
from trainer.errors import StorageError
from trainer.run import layout
from trainer.run.folder import command
from trainer.run.records import generations
from trainer.store import Store


@dataclass(frozen=True)
class Report:
    """The figures of each run, and where the page was written, if it was."""

    runs: list[RunFigures]
    written: str | None

    def to_json(self) -> dict[str, Any]:
        return {"written": self.written, "runs": [figures.to_json() for figures in self.runs]}


def report_html(runs: Sequence[RunFigures]) -> str:
    """One HTML file: the whole of one run, or a comparison of several."""
    return run_page(runs[0]) if len(runs) == 1 else comparison_page(runs)


def write_report(folders: Sequence[Store], output: Path | None, *, dry_run: bool = False) -> Report:
    """Write the page to `output`, by default into the folder of the one run, or beside the caller for several.

    Raises `StorageError` when a run's folder cannot be read, or the page not be written.
    """
    runs = [read_figures(folder) for folder in folders]
    if output is None and len(folders) == 1:
        if not dry_run:
            folders[0].put(layout.REPORT, report_html(runs).encode())
        return Report(runs, f"{folders[0].uri.removeprefix('file://')}/{layout.REPORT}")
    target = output or Path(layout.REPORT)
    if not dry_run:
        try:
            target.write_text(report_html(runs), encoding="utf-8")
        except OSError as error:
            raise StorageError(f"-o: {target} cannot be written: {error.strerror}.") from error
    return Report(runs, str(target))


def keep_report(run: Store, log: Callable[[str], None]) -> None:
    """Write the page of a run that has ended into its folder; a failure is said, and never decides how the run ends."""
    try:
        if generations(run):
            log(f"the report is {write_report([run], None).written}")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".rstrip(".")
        log(
            f"the report could not be written, which does not end the run: {reason}. {command('report', run)} tries again."
        )
