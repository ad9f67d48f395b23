"""The verb that shows what runs did, as a page."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.options import DryRun, Json, StoreOption, log, open_run


def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs by name in the store, or by full URI.")],
    store: StoreOption = "runs",
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="A file, or - for stdout. Default: report.html in the run's folder; here, for several runs.",
        ),
    ] = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Make one HTML file that shows what a run did, or compares several: curves, restarts, evaluations, time, memory, cost."""
    from launcher.report.figures import read_figures
    from launcher.report.report import Report, report_html, write_report

    folders = [open_run(run, store) for run in runs]
    if output == "-" or (as_json and output is None):
        figures = [read_figures(folder) for folder in folders]
        if as_json:
            print(json.dumps(Report(figures, None).to_json()))
        else:
            sys.stdout.write(report_html(figures))
        return
    made = write_report(folders, Path(output) if output else None, dry_run=dry_run)
    if as_json:
        print(json.dumps(made.to_json()))
    else:
        log(f"{'would write' if dry_run else 'wrote'} {made.written}")
