"""Verbs for the time before a run: check the machine, plan the run, try its whole life in small."""

from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.command import Command, ConfigFile, DryRun, Json, Overrides, emit, say
from launcher.cli.shell import complete_gpu


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
    from launcher.doctor.doctor import diagnose, diagnosis_table
    from trainer.config import load_config
    from trainer.errors import ConfigError

    if base and config is None:
        raise ConfigError("--base: needs --config, which names the base. Add --config run.yaml.")
    report = diagnose(store, load_config(config) if config else None, reads_base=base)
    emit(report, as_json, diagnosis_table)
    raise typer.Exit(0 if report.ok else 2)


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="GPU",
            autocompletion=complete_gpu,
            help=(
                "The GPU to plan for: its name (H100, A100-80GB, RTX 4090, ...) or its memory (80GiB, 24GB; a bare"
                " number is "
                "in GiB). Default: that of cluster.slurm.gpu_type, or this machine's."
            ),
        ),
    ] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks on one node. Default: all of them.")] = None,
    longest: Annotated[
        bool,
        typer.Option(
            "--longest", help=("Show the longest row that fits, and what each setting that saves memory gains.")
        ),
    ] = False,
    failure_every: Annotated[
        float,
        typer.Option(
            "--failure-every",
            metavar="GPU_HOURS",
            min=1,
            help="GPU hours between two failures, for the cost of restarts. Default: as in Llama 3's training.",
        ),
    ] = 50_000,
    store_rate: Annotated[
        float | None,
        typer.Option(
            "--store-rate",
            metavar="GB_S",
            min=0.001,
            help=(
                "GB a second that all ranks together read of the base, for the time of a start. Default: as a run of"
                " the store has read, or 2.5 a node."
            ),
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show whether a run fits, how long it is, how long it takes and what it costs: memory, batch and traffic, without
    a GPU. Exit code 4 if it does not fit.
    """
    from launcher.plan.planning import plan_run
    from launcher.plan.summary import show_plan
    from trainer.config import load_config

    run = load_config(config, overrides or (), say)
    if longest:
        from launcher.plan.summary import find_longest, show_longest

        emit(find_longest(run, gpu, ranks_per_node), as_json, show_longest)
        return
    planned = plan_run(run, gpu, ranks_per_node, failure_every, store_rate and 1e9 * store_rate)
    emit(planned, as_json, lambda found: show_plan(found, run))
    planned.check()


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
    images: Annotated[
        bool, typer.Option("--images", help="Make a run over pictures, with a small base that sees.")
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
    kinds = {"online": online, "images": images}
    result = run_smoke(given, overrides or (), layers=layers, **kinds, directory=directory, show=not as_json)
    emit(result, as_json, table)
    raise typer.Exit(0 if result.ok else result.exit_code or 1)


VERBS = {
    "doctor": Command(doctor, "doctor --store s3://bucket/runs", 10),
    "plan": Command(plan, "plan run.yaml --gpu H100", 40, {"--gpu-memory": "--gpu 80GiB"}),
    "smoke": Command(smoke, "smoke run.yaml --layers 2", 170),
}
