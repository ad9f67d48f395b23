"""Verbs that hand a run over to a cluster."""

from typing import Annotated

import typer

from launcher.cli.command import Command
from launcher.cli.options import ConfigFile, DryRun, Json, Overrides, TakeOver, emit, log, say


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


GROUPS = {"submit": "Hand a run over to a cluster and return."}

VERBS = {
    "submit ray": Command(submit_ray, "submit ray run.yaml --dry-run", 310),
    "submit slurm": Command(submit_slurm, "submit slurm run.yaml --dry-run", 311),
}
