"""The verb that shows what runs did, as a page."""

import json
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.command import Command
from launcher.cli.options import DryRun, Json, StoreOption, log, open_run
from launcher.cli.shell import complete_run
from launcher.view.terminal import put


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Runs or sweeps, by name in the store or by full URI.",
            autocompletion=complete_run,
        ),
    ],
    store: StoreOption = "runs",
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help=(
                "A file, or - for stdout. Default: report.html in the run's folder; in this directory for several runs."
            ),
        ),
    ] = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Make one HTML file that shows what a run or a sweep did, or compares several runs. With --json print only the
    figures, unless -o names a file for the page.
    """
    from launcher.report.report import read_report, target_of, write_report

    folders = [open_run(run, store) for run in runs]
    path = Path(output) if output and output != "-" else None
    writes = not dry_run and (path is not None or not (as_json or output))
    made = write_report(folders, path) if writes else read_report(folders)
    if as_json:
        print(json.dumps({"written": target_of(folders, path) if writes else None, **made.figures}))
    elif output == "-":
        put(made.page(), end="")
    else:
        log(f"{'wrote' if writes else 'would write'} {target_of(folders, path)}")


VERBS = {
    "report": Command(report, "report first second -o both.html", 130),
}
