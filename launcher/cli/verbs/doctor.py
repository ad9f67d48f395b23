"""The verb that checks this machine."""

from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.command import Command
from launcher.cli.options import Json, emit


def doctor(
    store: Annotated[
        str | None,
        typer.Option("--store", envvar="CAPSTAN_STORE", help=("A store to test: writes, reads and removes a probe.")),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", help=("A run's file: its cluster.nccl applies, and --base reads its base.")),
    ] = None,
    base: Annotated[
        bool,
        typer.Option(
            "--base",
            help=("Read every byte of the base and compare it with the Hub's hashes, or those that the run has kept."),
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check this machine: versions, accelerator, kernels, a store, and in a Slurm allocation NCCL's network on all
    nodes. Says what is missing and how to get it.
    """
    from launcher.doctor.doctor import diagnose, report_table
    from trainer.config import load_config
    from trainer.errors import ConfigError

    if base and config is None:
        raise ConfigError("--base: needs --config, which names the base. Add --config run.yaml.")
    report = diagnose(store, load_config(config) if config else None, reads_base=base)
    emit(report, as_json, report_table)
    raise typer.Exit(0 if report.ok else 2)


VERBS = {
    "doctor": Command(doctor, "doctor --store s3://bucket/runs", 10),
}
