"""Verbs about runs that exist: list, watch, stop, compare and show them, and keep their checkpoints in order."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli.command import Command, DryRun, Json, RunName, StoreOption, emit, finite, log, open_run
from launcher.cli.shell import complete_run
from launcher.view.terminal import put
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
    follow: Annotated[bool, typer.Option("--watch", help="Keep showing the status until the run ends.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a run or a sweep is doing, from its folder alone, and for a run on Slurm the state of its jobs."""
    from launcher.cluster.slurm.queue import is_over, slurm_status, submitted_jobs
    from launcher.view.status import read_status
    from launcher.view.sweep import is_sweep
    from launcher.view.watch import render_status, watch_table

    folder = open_run(run, store, prepared=True, sweeps=True)
    if is_sweep(folder):
        _show_sweep(folder, follow=follow, as_json=as_json)
        return
    job = submitted_jobs(folder)
    if follow:
        watch_table(folder, is_over(folder, job) if job else None)
    if job and (as_json or not follow):
        emit(slurm_status(folder, job), as_json, lambda status: status.table())
    elif as_json or not follow:
        emit(read_status(folder), as_json, render_status)


def _show_sweep(folder: Any, *, follow: bool, as_json: bool) -> None:
    from launcher.view.sweep import read_sweep, render_sweep, watch_sweep, while_it_runs

    if follow:
        watch_sweep(folder, while_it_runs(folder), live=True, log=log)
    if as_json or not follow:
        emit(read_sweep(folder), as_json, render_sweep)


def logs(
    run: RunName,
    store: StoreOption = "runs",
    rank: Annotated[int, typer.Option(help="The rank whose log is shown.")] = 0,
    generation: Annotated[int | None, typer.Option(help="The number of the start. Default: the newest.")] = None,
    driver: Annotated[bool, typer.Option("--driver", help="Show the driver's log instead of a rank's.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more, as the log grows.")] = False,
    words: Annotated[str, typer.Option("--find", help="Show only the last lines with all these words.")] = "",
    job: Annotated[
        bool, typer.Option("--job", help="Show the Slurm job's own output instead: Ray and the driver.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show a rank's log, or the driver's."""
    from launcher.cluster.slurm.queue import job_output
    from launcher.view.terminal import in_lines, put
    from launcher.view.watch import find_in_log, follow_log, read_driver_log, read_log

    folder = open_run(run, store)
    if words and (follow or driver or job):
        raise ConfigError("--find looks into a rank's log. Leave out --follow, --driver and --job, or --find.")
    if follow and (as_json or driver or job):
        raise ConfigError("--follow shows a rank's log as it grows. Leave out --json, --driver and --job, or --follow.")
    if follow:
        for text in follow_log(folder, rank, generation):
            put(in_lines(text), end="")
        return
    if words:
        text = "".join(f"{line}\n" for line in find_in_log(folder, rank, generation, words))
    else:
        text = job_output(folder) if job else read_driver_log(folder) if driver else read_log(folder, rank, generation)
    if as_json:
        owner = {"job": True} if job else {"driver": True} if driver else {"rank": rank, "generation": generation}
        print(json.dumps({"run": folder.uri, **owner, "text": text}))
    else:
        put(in_lines(text), end="")


def stop(run: RunName, store: StoreOption = "runs", as_json: Json = False, dry_run: DryRun = False) -> None:
    """Ask a run to commit a checkpoint and end with exit code 75. A Slurm job that has not started is cancelled."""
    from launcher.cluster.slurm import queue
    from launcher.start.attempts import give_up_waiting
    from trainer.run.folder import command
    from trainer.run.requests import request_stop

    folder = open_run(run, store, sweeps=True)
    over = None if queue.submitted_jobs(folder) else _is_over(folder)
    if over:
        what = over
    elif job := queue.submitted_jobs(folder):
        what = queue.stop_jobs(folder, job, dry_run=dry_run)
    elif dry_run:
        what = f"would ask {folder.uri} to stop"
    else:
        request_stop(folder, by="capstan stop")
        what = f"asked {folder.uri} to stop"
    if not (dry_run or over):
        give_up_waiting(folder)
    if as_json:
        asked = not (dry_run or over)
        print(json.dumps({"run": folder.uri, "stop_requested": asked, "dry_run": dry_run, "what": what}))
    else:
        log(what if dry_run or over else f"{what}; {command('status', folder)} shows what becomes of it")


def _is_over(folder: Any) -> str | None:
    """Return a sentence if the run or sweep has ended and nobody has it, so that there is nothing to stop."""
    from launcher.view.status import ENDED, read_status
    from launcher.view.sweep import is_sweep, read_sweep
    from trainer.run.owner import StoreClock, read_owner

    owner = read_owner(folder)
    status = read_sweep(folder) if is_sweep(folder) else read_status(folder)
    if status.state not in ENDED or (owner is not None and owner.is_alive(StoreClock(folder))):
        return None
    return f"{folder.uri} is {status.state} already; nothing was asked{status.next and f'. Next: {status.next}'}"


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

    folders = [open_run(run, store, sweeps=True) for run in runs]
    path = Path(output) if output and output != "-" else None
    writes = not dry_run and (path is not None or not (as_json or output))
    made = write_report(folders, path) if writes else read_report(folders)
    if as_json:
        print(json.dumps({"written": target_of(folders, path) if writes else None, **made.figures}))
    elif output == "-":
        put(made.page(), end="")
    else:
        log(f"{'wrote' if writes else 'would write'} {target_of(folders, path)}")


def board(
    stores: Annotated[
        list[str] | None, typer.Argument(metavar="[STORE ...]", help="Folders or buckets with runs. Default: --store.")
    ] = None,
    store: Annotated[
        str, typer.Option("--store", envvar="CAPSTAN_STORE", help="A folder or bucket with runs.")
    ] = "runs",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="The port. Default: the first free one from 8899 on.")
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Show no buttons, and start nothing.")] = False,
) -> None:
    """Show the runs of stores on a page in the browser, on this machine alone. It prints the address with a token."""
    from importlib.util import find_spec

    from trainer.errors import ConfigError
    from trainer.store.store import open_store

    if not (find_spec("starlette") and find_spec("uvicorn")):
        raise ConfigError("the board needs Starlette and uvicorn: pip install 'capstan-llm[board]'.")
    from launcher.board.server import serve

    serve([open_store(place) for place in stores or [store]], port=port, read_only=read_only, log=log)


GROUPS = {
    "checkpoints": "A run's committed checkpoints.",
}

VERBS = {
    "ls": Command(ls, "ls --store s3://bucket/runs", 70),
    "status": Command(status, "status first --watch", 80),
    "logs": Command(logs, "logs first --follow", 90),
    "stop": Command(stop, "stop first", 100),
    "checkpoints ls": Command(checkpoints_ls, "checkpoints ls first", 330),
    "checkpoints verify": Command(checkpoints_verify, "checkpoints verify first --best", 331),
    "checkpoints prune": Command(checkpoints_prune, "checkpoints prune first --keep-last 1 --dry-run", 332),
    "report": Command(report, "report first second -o both.html", 130),
    "board": Command(board, "board s3://bucket/runs --read-only", 135),
}
