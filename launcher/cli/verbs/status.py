"""The verb that shows what a run or a sweep is doing."""

from typing import Annotated, Any

import typer

from launcher.cli.command import Command
from launcher.cli.options import Json, RunName, StoreOption, emit, log, open_run


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
    from launcher.view.tables import render, watch_table

    folder = open_run(run, store, prepared=True)
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


VERBS = {
    "status": Command(status, "status first --watch", 80),
}
