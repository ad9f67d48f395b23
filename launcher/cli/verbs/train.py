"""The verb that trains, here and now."""

import json
import sys
from typing import Any

from launcher.cli.command import Command
from launcher.cli.options import ConfigFile, DryRun, Json, Overrides, emit, log, say
from launcher.view.terminal import put
from trainer.errors import CapstanError


def train(config: ConfigFile, overrides: Overrides = None, as_json: Json = False, dry_run: DryRun = False) -> None:
    """Train here and now: on this machine, on the cluster of cluster.ray.address, or as a rank of torchrun or srun."""
    from trainer.config import load_config

    start_run(load_config(config, overrides or (), say), as_json=as_json, dry_run=dry_run)


def start_run(config: Any, *, resume: bool = False, take_over: bool = False, as_json: bool, dry_run: bool) -> None:
    """Train `config`'s run here, or continue it."""
    from launcher.cluster.slurm.queue import check_no_job
    from launcher.drive.local import start
    from launcher.start.check import check
    from launcher.start.group import is_silent_rank
    from launcher.view.status import read_status
    from launcher.view.tables import render
    from trainer.config import dump_config
    from trainer.run.folder import run_folder
    from trainer.run.layout import CONFIG

    if not (take_over or is_silent_rank()):
        check_no_job(run_folder(config))
    if dry_run:
        config = config.computing_in(check(config, resume=resume, take_over=take_over).config.model.dtype)
        put(json.dumps(config.model_dump(mode="json")) if as_json else dump_config(config).rstrip())
        return
    try:
        start(config, resume=resume, take_over=take_over, live=not as_json and sys.stderr.isatty(), log=log)
    except CapstanError:
        # The run's status is of interest even after a stop or a failure. A user's mistake leaves no run to describe.
        if as_json and not is_silent_rank() and run_folder(config).exists(CONFIG):
            emit(read_status(run_folder(config)), as_json, render)
        raise
    if not is_silent_rank():
        emit(read_status(run_folder(config)), as_json, render)


VERBS = {
    "train": Command(train, "train run.yaml train.epochs=0.5", 50),
}
