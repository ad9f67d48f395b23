"""Verbs about a run that is there, going on or ended: what it does, what it left, and how to stop it."""

import json
from typing import Annotated, Any

import typer

from launcher.cli.command import Command
from launcher.cli.options import DryRun, Json, RunName, StoreOption, emit, finite, log, open_run
from trainer.errors import ConfigError


def ls(
    place: Annotated[
        str | None, typer.Argument(metavar="[STORE]", help="A folder or bucket with runs; the same as --store.")
    ] = None,
    store: Annotated[
        str, typer.Option("--store", envvar="CAPSTAN_STORE", help="A folder or bucket with runs.")
    ] = "runs",
    as_json: Json = False,
) -> None:
    """List the runs of a store: state, progress, loss, and when each was heard of last."""
    from launcher.view.listing import list_runs
    from trainer.store.store import open_store

    emit(list_runs(open_store(place or store)), as_json, lambda found: found.table())


def status(
    run: RunName,
    store: StoreOption = "runs",
    follow: Annotated[bool, typer.Option("--watch", help="Keep showing it until the run ends.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a run or a sweep is doing, from its folder alone; for a run submitted to Slurm, Slurm's word on its jobs too."""
    from launcher.cluster.slurm.queue import is_over, slurm_status, submitted_jobs
    from launcher.view.status import read_status
    from launcher.view.sweep import is_sweep
    from launcher.view.tables import render, watch_table

    folder = open_run(run, store)
    if is_sweep(folder):
        _show_sweep(folder, follow=follow, as_json=as_json)
        return
    job = submitted_jobs(folder)
    if follow:
        watch_table(folder, is_over(folder, job) if job else None)
    if job and (as_json or not follow):
        emit(slurm_status(folder, job), as_json, lambda status: status.table())
    elif as_json or not follow:
        emit(read_status(folder), as_json, render)


def _show_sweep(folder: Any, *, follow: bool, as_json: bool) -> None:
    from launcher.view.sweep import read_sweep, render_sweep, watch_sweep, while_it_runs

    if follow:
        watch_sweep(folder, while_it_runs(folder), live=True, log=log)
    if as_json or not follow:
        emit(read_sweep(folder), as_json, render_sweep)


def logs(
    run: RunName,
    store: StoreOption = "runs",
    rank: Annotated[int, typer.Option(help="Whose log.")] = 0,
    generation: Annotated[int | None, typer.Option(help="Which start of the run. Default: the newest.")] = None,
    driver: Annotated[bool, typer.Option("--driver", help="What the driver said, instead of a rank.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as the log grows.")] = False,
    job: Annotated[bool, typer.Option("--job", help="The Slurm job's own output instead: Ray and the driver.")] = False,
    as_json: Json = False,
) -> None:
    """A rank's log, or the driver's."""
    from launcher.view.logs import follow_log, read_driver_log, read_log
    from launcher.view.terminal import in_lines, put

    folder = open_run(run, store)
    if follow and (as_json or driver or job):
        raise ConfigError("--follow shows a rank's log as it grows. Leave out --json, --driver and --job, or --follow.")
    if driver or job or as_json:
        from launcher.cluster.slurm.queue import job_output

        text = job_output(folder) if job else read_driver_log(folder) if driver else read_log(folder, rank, generation)
        owner = {"job": True} if job else {"driver": True} if driver else {"rank": rank, "generation": generation}
        if as_json:
            print(json.dumps({"run": folder.uri, **owner, "text": text}))
        else:
            put(in_lines(text), end="")
    elif follow:
        for text in follow_log(folder, rank, generation):
            put(in_lines(text), end="")
    else:
        put(in_lines(read_log(folder, rank, generation)), end="")


def stop(run: RunName, store: StoreOption = "runs", as_json: Json = False, dry_run: DryRun = False) -> None:
    """Ask a run to commit a checkpoint and end with exit code 75; a Slurm job that has not started is cancelled."""
    from launcher.cluster.slurm import queue
    from launcher.start.stopping import give_up_waiting
    from trainer.run.folder import command
    from trainer.run.requests import request_stop

    folder = open_run(run, store)
    if job := queue.submitted_jobs(folder):
        what = queue.stop(folder, job, dry_run=dry_run)
    elif dry_run:
        what = f"would ask {folder.uri} to stop"
    else:
        request_stop(folder, by="capstan stop")
        what = f"asked {folder.uri} to stop"
    if not dry_run:
        give_up_waiting(folder)
    if as_json:
        print(json.dumps({"run": folder.uri, "stop_requested": not dry_run, "dry_run": dry_run, "what": what}))
    else:
        log(what if dry_run else f"{what}; {command('status', folder)} shows what becomes of it")


def checkpoints_ls(run: RunName, store: StoreOption = "runs", as_json: Json = False) -> None:
    """List committed checkpoints: step, size, age, world size, evaluation loss."""
    from launcher.view.checkpoints import checkpoint_table, list_checkpoints

    emit(list_checkpoints(open_run(run, store)), as_json, checkpoint_table)


def checkpoints_verify(
    run: RunName,
    store: StoreOption = "runs",
    step: Annotated[int | None, typer.Option(help="Only this one. Default: all.")] = None,
    best: Annotated[bool, typer.Option("--best", help="Only the one with the lowest evaluation loss.")] = False,
    as_json: Json = False,
) -> None:
    """Read every checkpoint whole and compare it with its hashes. Exit code 6 when one is damaged."""
    from launcher.view.checkpoints import checkpoint_table, verify_checkpoints
    from trainer.state.checkpoint.choice import chosen_step

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
            help="Remove what no commit refers to when it is so old. Below an hour only when no job runs.",
        ),
    ] = 24.0,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Remove the checkpoints that the rules do not keep, and what dead saves left behind."""
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


VERBS = {
    "ls": Command(ls, "ls --store s3://bucket/runs", 70),
    "status": Command(status, "status first --watch", 80),
    "logs": Command(logs, "logs first --follow", 90),
    "stop": Command(stop, "stop first", 100),
    "checkpoints ls": Command(checkpoints_ls, "checkpoints ls first", 330),
    "checkpoints verify": Command(checkpoints_verify, "checkpoints verify first --best", 331),
    "checkpoints prune": Command(checkpoints_prune, "checkpoints prune first --keep-last 1 --dry-run", 332),
}
