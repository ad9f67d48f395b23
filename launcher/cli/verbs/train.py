"""Verbs that start a run or a sweep, or continue it: here and now, or on a cluster."""

import json
import sys
from typing import Annotated, Any

import typer

from launcher.cli.command import (
    Command,
    ConfigFile,
    DryRun,
    Json,
    Overrides,
    RunName,
    StoreOption,
    TakeOver,
    TrustRun,
    emit,
    log,
    open_run,
    say,
)
from launcher.view.terminal import put
from trainer.errors import CapstanError, ConfigError


def train(config: ConfigFile, overrides: Overrides = None, as_json: Json = False, dry_run: DryRun = False) -> None:
    """Train here and now: on this machine, on the cluster of cluster.ray.address, or as a rank of torchrun or srun."""
    from trainer.config import load_config

    start_run(load_config(config, overrides or (), say), as_json=as_json, dry_run=dry_run)


def start_run(config: Any, *, resume: bool = False, take_over: bool = False, as_json: bool, dry_run: bool) -> None:
    """Train `config`'s run here, or continue it."""
    from launcher.cluster.slurm.queue import check_no_job
    from launcher.drive.local import checked_here, start
    from launcher.start.check import anchored
    from launcher.start.group import is_rank, is_silent_rank
    from launcher.view.status import read_status
    from launcher.view.watch import render_status
    from trainer.config import dump_config
    from trainer.processes.deferred import makes_tokens_alone
    from trainer.run.folder import run_folder
    from trainer.run.layout import CONFIG
    from trainer.run.records import generations

    if not (take_over or is_silent_rank()):
        check_no_job(run_folder(config))
    if dry_run:
        config, _ = checked_here(anchored(config), resume=resume, take_over=take_over, log=log)
        put(json.dumps(config.model_dump(mode="json")) if as_json else dump_config(config).rstrip())
        return
    if not is_rank():  # a driver, whose ranks are other processes
        makes_tokens_alone()
    described = as_json and not is_silent_rank()
    known = generations(run_folder(config)) if described else []
    try:
        start(config, resume=resume, take_over=take_over, live=not as_json and sys.stderr.isatty(), log=log)
    except CapstanError as error:
        # The run's status is of interest even after a stop or a failure. Refused data leaves no run to describe, and
        # where a setting is refused before any rank begins, the run of this name may be another one.
        refused = described and isinstance(error, ConfigError) and generations(run_folder(config)) == known
        if described and not refused and run_folder(config).exists(CONFIG):
            emit(read_status(run_folder(config)), as_json, render_status)
        raise
    if not is_silent_rank():
        emit(read_status(run_folder(config)), as_json, render_status)


def resume(
    run: RunName,
    overrides: Overrides = None,
    store: StoreOption = "runs",
    take_over: TakeOver = False,
    trust_run: TrustRun = False,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Continue a run from its newest committed checkpoint, on any number of ranks; or a sweep, with its unfinished
    trials.
    """
    from launcher.policy.foreign import check_own, started
    from launcher.view.sweep import is_sweep
    from trainer.run.folder import run_config

    folder = open_run(run, store, sweeps=True)
    config = run_config(folder, overrides or (), say=say)
    check_own(folder, config, started, overrides or (), trust=trust_run)
    if is_sweep(folder):
        start_sweep(config, resume=True, take_over=take_over, as_json=as_json, dry_run=dry_run)
        return
    start_run(config, resume=True, take_over=take_over, as_json=as_json, dry_run=dry_run)


def submit_ray(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest commit.")] = False,
    take_over: TakeOver = False,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Submit to the Ray cluster of cluster.ray.address or RAY_ADDRESS; without one, start in the background here."""
    from launcher.cluster.ray.jobs import submit
    from trainer.config import load_config

    submitted = submit(
        load_config(config, overrides or (), say), resume=resume, take_over=take_over, dry_run=dry_run, log=log
    )
    emit(submitted, as_json, lambda result: result.text())


def submit_slurm(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's newest commit.")] = False,
    take_over: TakeOver = False,
    after: Annotated[
        str | None,
        typer.Option("--after", metavar="RUN", help="Start when this run, submitted to Slurm, has finished."),
    ] = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Submit a batch job to Slurm; --dry-run prints the batch file."""
    from launcher.cluster.slurm.submit import submit
    from trainer.config import load_config

    given = load_config(config, overrides or (), say)
    submitted = submit(given, resume=resume, take_over=take_over, after=after, dry_run=dry_run, log=log)
    emit(submitted, as_json, lambda result: result.text())


def sweep(config: ConfigFile, overrides: Overrides = None, as_json: Json = False, dry_run: DryRun = False) -> None:
    """Try the settings of the section `sweep`, each trial as a run of its own, and end bad trials early."""
    from trainer.config import load_config

    start_sweep(load_config(config, overrides or (), say), as_json=as_json, dry_run=dry_run)


def start_sweep(config: Any, *, resume: bool = False, take_over: bool = False, as_json: bool, dry_run: bool) -> None:
    """Start `config`'s sweep, or continue it."""
    from launcher.drive.sweep import laid_out, run_sweep
    from launcher.policy.trials import trial_in_words
    from launcher.view.sweep import is_sweep, read_sweep, render_sweep
    from trainer.run.folder import run_folder

    if dry_run:
        _, plan = laid_out(config, resume=resume)
        lines = (f"{trial.run}: {trial_in_words(trial.settings)}" for trial in plan.trials)
        put(json.dumps(plan.to_json()) if as_json else "\n".join(lines))
        return
    live = not as_json and sys.stderr.isatty()
    try:
        emit(run_sweep(config, resume=resume, take_over=take_over, live=live, log=log), as_json, render_sweep)
    except ConfigError:
        raise  # the existing sweep may be another one's
    except CapstanError:
        folder = run_folder(config)
        if is_sweep(folder):
            emit(read_sweep(folder), as_json, render_sweep)
        raise


GROUPS = {
    "submit": "Hand a run over to a cluster and return.",
}

VERBS = {
    "train": Command(train, "train run.yaml train.epochs=0.5", 50),
    "resume": Command(resume, "resume first cluster.workers=1", 60),
    "submit ray": Command(submit_ray, "submit ray run.yaml --dry-run", 310),
    "submit slurm": Command(submit_slurm, "submit slurm run.yaml --dry-run", 311),
    "sweep": Command(sweep, "sweep sweep.yaml", 140),
}
