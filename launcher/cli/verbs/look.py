"""Verbs that need no run: they look at this machine, a configuration or its data, or try it all in small."""

import json
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.command import Command
from launcher.cli.options import ConfigFile, DryRun, Json, Overrides, emit, log, say
from launcher.cli.shell import complete_gpu


def doctor(
    store: Annotated[
        str | None, typer.Option("--store", envvar="CAPSTAN_STORE", help="A store to write a probe to.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="A run whose cluster.nccl counts, and whose base --base reads.")
    ] = None,
    base: Annotated[
        bool,
        typer.Option(
            "--base", help="Read every byte of the base and compare it with the Hub's hashes or those kept by the run."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Check this machine: versions, accelerator, kernels, a store, in a Slurm allocation NCCL's network on all nodes; say what
    is missing and how to get it."""
    from launcher.doctor.doctor import diagnose, report_table
    from trainer.config import load_config
    from trainer.errors import ConfigError

    if base and config is None:
        raise ConfigError("--base: needs --config, which names the base. Add --config run.yaml.")
    report = diagnose(store, load_config(config) if config else None, reads_base=base)
    emit(report, as_json, report_table)
    raise typer.Exit(0 if report.ok else 2)


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            "--gpu-memory",
            metavar="GPU",
            autocompletion=complete_gpu,
            help="The GPU to plan for: its name (H100, A100-80GB, RTX 4090, ...) or its memory (80GiB, 24GB; a bare number is "
            "in GiB). Default: that of cluster.slurm.gpu_type, or this machine's.",
        ),
    ] = None,
    ranks_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks on one node. Default: all of them.")] = None,
    longest: Annotated[
        bool, typer.Option("--longest", help="The longest row that fits, and what each setting that saves memory buys.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Does it fit, how long is it, how long does it take, what does it cost? Memory, batch and traffic, without a GPU. Exit code 4
    when it does not fit."""
    from launcher.plan.opening import show_plan
    from launcher.plan.planning import plan_run
    from trainer.config import load_config

    run = load_config(config, overrides or (), say)
    if longest:
        from launcher.plan.longest import find_longest, show_longest

        emit(find_longest(run, gpu, ranks_per_node), as_json, show_longest)
        return
    planned = plan_run(run, gpu, ranks_per_node)
    emit(planned, as_json, lambda found: show_plan(found, run))
    planned.check()


def data_build(config: ConfigFile, overrides: Overrides = None, as_json: Json = False, dry_run: DryRun = False) -> None:
    """Compile the sources into token shards, as train does by itself when they are missing."""
    from launcher.data.build import build

    emit(build(config, overrides or (), dry_run=dry_run, log=log), as_json, lambda result: result.table())


def data_check(config: ConfigFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Report on the sources: lengths, duplicates, odd and bad rows. Exit code 3 when train would refuse them."""
    from launcher.data.check import check, report_table
    from trainer.errors import DataError

    report = check(config, overrides or (), say)
    emit(report, as_json, report_table)
    if report.refusals:
        raise DataError("\n".join(report.refusals))


def data_show(
    config: ConfigFile,
    overrides: Overrides = None,
    row: Annotated[
        int | None, typer.Option("--row", min=1, help="The row of this number, from 1. Default: the first rows.")
    ] = None,
    packed: Annotated[bool, typer.Option("--packed", help="Packed rows, with their documents' borders.")] = False,
    split: Annotated[str, typer.Option("--split", help="train or eval.")] = "train",
    as_json: Json = False,
) -> None:
    """Show rows as the model sees them: what is trained, special tokens, and what of a row is not in its text."""
    from launcher.data.show import render, show

    shown = show(config, overrides or (), say, row=row, packed=packed, split=split)
    # Its colours are control characters of its own, and it shows those of the rows.
    print(json.dumps(shown.to_json()) if as_json else render(shown))


def config_schema() -> None:
    """Print the JSON Schema of the configuration, for editors."""
    from trainer.config import Config

    print(json.dumps(Config.model_json_schema(), indent=2))


def smoke(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="Your own run, scaled down. Default: a small one, made on the spot."),
    ] = None,
    overrides: Overrides = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Use only the first layers of your base.")] = None,
    directory: Annotated[
        Path, typer.Option("--dir", help="Where it works; kept, so that a second time is faster.")
    ] = Path("smoke"),
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Take one run through its whole life in small: train, kill, resume on another world size, export, verify."""
    from launcher.smoke.life import plan_smoke, run_smoke
    from launcher.smoke.verdict import table

    if dry_run:
        planned = plan_smoke(config, overrides or (), say, layers=layers, directory=directory)
        emit(planned, as_json, lambda plan: plan.text())
        return
    result = run_smoke(config, overrides or (), say, layers=layers, directory=directory, show=not as_json)
    emit(result, as_json, table)
    raise typer.Exit(0 if result.ok else result.exit_code or 1)


VERBS = {
    "doctor": Command(doctor, "doctor --store s3://bucket/runs", 10),
    "plan": Command(plan, "plan run.yaml --gpu H100", 40),
    "smoke": Command(smoke, "smoke run.yaml --layers 2", 170),
    "data build": Command(data_build, "data build run.yaml", 300),
    "data check": Command(data_check, "data check run.yaml", 301),
    "data show": Command(data_show, "data show run.yaml --row 7", 302),
    "config schema": Command(config_schema, "config schema", 323),
}
