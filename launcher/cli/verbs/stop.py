"""The verb that asks a run to stop."""

import json

from launcher.cli.command import Command
from launcher.cli.options import DryRun, Json, RunName, StoreOption, log, open_run


def stop(run: RunName, store: StoreOption = "runs", as_json: Json = False, dry_run: DryRun = False) -> None:
    """Ask a run to commit a checkpoint and end with exit code 75. A Slurm job that has not started is cancelled."""
    from launcher.cluster.slurm import queue
    from launcher.start.attempts import give_up_waiting
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


VERBS = {
    "stop": Command(stop, "stop first", 100),
}
