"""Verbs about what a run learns from: its compiled data, and the processes beside it that judge and sample."""

import json
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.command import (
    Command,
    ConfigFile,
    DryRun,
    Json,
    Overrides,
    RunName,
    StoreOption,
    TrustRun,
    emit,
    log,
    open_run,
    say,
)


def data_build(config: ConfigFile, overrides: Overrides = None, as_json: Json = False, dry_run: DryRun = False) -> None:
    """Compile the sources into token shards, as train does by itself when they are missing."""
    from launcher.data.data import build
    from trainer.config import load_config
    from trainer.processes.deferred import makes_tokens_alone

    makes_tokens_alone()
    built = build(load_config(config, overrides or (), log), dry_run=dry_run, log=log)
    emit(built, as_json, lambda result: result.table())


def data_check(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Report on the sources: lengths, duplicates, odd and bad rows. Exit code 3 if train would refuse them."""
    from launcher.data.data import report_data, report_table
    from trainer.errors import DataError
    from trainer.processes.deferred import makes_tokens_alone

    makes_tokens_alone()
    report = report_data(config, overrides or (), say)
    emit(report, as_json, report_table)
    if report.refusals:
        raise DataError("\n".join(report.refusals))


def data_show(
    config: ConfigFile,
    overrides: Overrides = None,
    row: Annotated[
        int | None, typer.Option("--row", min=1, help=("Show the row of this number, from 1. Default: the first rows."))
    ] = None,
    packed: Annotated[
        bool, typer.Option("--packed", help="Show packed rows, with the borders of their documents.")
    ] = False,
    split: Annotated[str, typer.Option("--split", help="train or eval.")] = "train",
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write a page with the rows, and pictures in their places."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show rows as the model sees them: what is trained, special tokens, and what a row loses."""
    from launcher.data.data import page_of_rows, render_shown, show
    from trainer.errors import StorageError, counted
    from trainer.processes.deferred import makes_tokens_alone

    makes_tokens_alone()
    shown = show(config, overrides or (), say, row=row, packed=packed, split=split)
    if html is not None:
        try:
            html.write_text(page_of_rows(shown), encoding="utf-8")
        except OSError as error:
            raise StorageError(f"--html: {html} cannot be written: {error.strerror}. Name another file.") from error
        say(f"{html} shows {counted(len(shown.rows), 'row')}")
        if not as_json:
            return
    # Its colours are control characters of its own, and it shows those of the rows.
    print(json.dumps(shown.to_json()) if as_json else render_shown(shown))


def teach(config: ConfigFile, overrides: Overrides = None, as_json: Json = False, dry_run: DryRun = False) -> None:
    """Ask the teacher of objective.teacher for its log-probabilities and store them beside the data, once, before the
    run. For opd, judge the answers beside the run. Continues where it was killed.
    """
    from launcher.data.answers import teach as taught
    from launcher.start.group import is_silent_rank

    found = taught(config, overrides or (), dry_run=dry_run, log=say)
    if not is_silent_rank():
        emit(found, as_json, lambda result: result.sentence())


def rollout(
    run: RunName,
    overrides: Overrides = None,
    store: StoreOption = "runs",
    trust_run: TrustRun = False,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Ask the servers of rollout.engine for the answers that a run learns from, beside the run, until it has all of
    them. The run normally starts this itself.
    """
    from launcher.data.answers import rollout as rolled
    from launcher.policy.foreign import check_own, started
    from trainer.run.folder import run_config

    folder = open_run(run, store)
    check_own(folder, run_config(folder, overrides or ()), started, overrides or (), trust=trust_run)
    found = rolled(folder, overrides or (), dry_run=dry_run, log=say)
    emit(found, as_json, lambda result: result.sentence())


GROUPS = {
    "data": "Compile and inspect training data.",
}

VERBS = {
    "data build": Command(data_build, "data build run.yaml", 300),
    "data check": Command(data_check, "data check run.yaml", 301),
    "data show": Command(data_show, "data show run.yaml --row 7", 302),
    "teach": Command(teach, "teach distil.yaml --dry-run", 45),
    "rollout": Command(rollout, "rollout my-run", 47),
}
