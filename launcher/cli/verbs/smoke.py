"""The verb that tries a whole run in small."""

from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.command import Command
from launcher.cli.options import DryRun, Json, Overrides, emit, say


def smoke(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CONFIG]",
            help=("Your own run, which is scaled down. Default: a small one that is made on the spot."),
        ),
    ] = None,
    overrides: Overrides = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Use only the first layers of your base.")] = None,
    online: Annotated[
        bool, typer.Option("--online", help="Make a run that learns from the rewards of answers that it samples.")
    ] = False,
    directory: Annotated[
        Path, typer.Option("--dir", help="Folder to work in. It is kept, so that a second time is faster.")
    ] = Path("smoke"),
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Take one run through its whole life in small: train, kill, resume on another number of ranks, export, verify."""
    from launcher.smoke.life import plan_smoke, run_smoke
    from launcher.smoke.verdict import table
    from trainer.config import load_config

    given = load_config(config, overrides or (), say) if config else None
    if dry_run:
        emit(plan_smoke(given, layers=layers, directory=directory), as_json, lambda plan: plan.text())
        return
    result = run_smoke(given, overrides or (), layers=layers, online=online, directory=directory, show=not as_json)
    emit(result, as_json, table)
    raise typer.Exit(0 if result.ok else result.exit_code or 1)


VERBS = {
    "smoke": Command(smoke, "smoke run.yaml --layers 2", 170),
}
