"""Verbs about a run's committed checkpoints: list, verify and prune them."""

from typing import Annotated

import typer

from launcher.cli.command import Command
from launcher.cli.options import DryRun, Json, RunName, StoreOption, emit, finite, log, open_run


def checkpoints_ls(run: RunName, store: StoreOption = "runs", as_json: Json = False) -> None:
    """List committed checkpoints: step, size, age, number of ranks, evaluation loss."""
    from launcher.view.checkpoints import checkpoint_table, list_checkpoints

    emit(list_checkpoints(open_run(run, store)), as_json, checkpoint_table)


def checkpoints_verify(
    run: RunName,
    store: StoreOption = "runs",
    step: Annotated[int | None, typer.Option(help="Only the checkpoint of this step. Default: all.")] = None,
    best: Annotated[bool, typer.Option("--best", help="Only the one with the lowest evaluation loss.")] = False,
    as_json: Json = False,
) -> None:
    """Read every checkpoint completely and compare it with its hashes. Exit code 6 if one is damaged."""
    from launcher.view.checkpoints import checkpoint_table, verify_checkpoints
    from trainer.state.checkpoint.manifest import chosen_step

    folder = open_run(run, store)
    found = verify_checkpoints(folder, chosen_step(folder, step, best=best))
    emit(found, as_json, checkpoint_table)
    raise typer.Exit(0 if found.ok else 6)


def checkpoints_prune(
    run: RunName,
    store: StoreOption = "runs",
    keep_last: Annotated[int | None, typer.Option(min=1, help="Default: the run's checkpoint.keep_last.")] = None,
    keep_every: Annotated[int | None, typer.Option(min=0, help="Default: the run's checkpoint.keep_every.")] = None,
    keep_best: Annotated[int | None, typer.Option(min=0, help="Default: the run's checkpoint.keep_best.")] = None,
    orphan_hours: Annotated[
        float,
        typer.Option(
            min=0,
            max=1e6,
            callback=finite,
            help="Remove files older than this to which no commit refers. Below an hour only if no job runs.",
        ),
    ] = 24.0,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Remove the checkpoints that the rules do not keep, and what dead saves left."""
    from launcher.view.checkpoints import prune_checkpoints

    folder = open_run(run, store)
    pruned = prune_checkpoints(
        folder,
        keep_last=keep_last,
        keep_every=keep_every,
        keep_best=keep_best,
        orphan_hours=orphan_hours,
        dry_run=dry_run,
        log=log,
    )
    emit(pruned, as_json, lambda result: result.sentence())


GROUPS = {"checkpoints": "A run's committed checkpoints."}

VERBS = {
    "checkpoints ls": Command(checkpoints_ls, "checkpoints ls first", 330),
    "checkpoints verify": Command(checkpoints_verify, "checkpoints verify first --best", 331),
    "checkpoints prune": Command(checkpoints_prune, "checkpoints prune first --keep-last 1 --dry-run", 332),
}
