"""Verbs that write a first configuration: from a few answers, from another tool's, or from a recipe with small data."""

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli.command import Command, DryRun, Force, Json, countable, log
from launcher.cli.shell import complete_goal, complete_gpu, complete_machine, complete_peer, complete_recipe
from trainer.errors import ConfigError
from trainer.processes.helper_thread import waiting_for_a_person


def init(
    config: Annotated[Path, typer.Argument(metavar="[CONFIG]", help="The file to write.")] = Path("run.yaml"),
    base: Annotated[
        str | None, typer.Option("--base", help="The base: a directory, an s3://, gs:// or az:// URI, or a Hub id.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="The training data: a file, a glob, a URI, or a data set of the Hub.")
    ] = None,
    goal: Annotated[
        str | None,
        typer.Option(
            "--goal",
            autocompletion=complete_goal,
            help="sft (the default), full, dpo, orpo, simpo or kto; see docs/methods.md.",
        ),
    ] = None,
    machine: Annotated[
        str | None,
        typer.Option(
            "--machine", autocompletion=complete_machine, help="one (this machine, the default), slurm or ray."
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            autocompletion=complete_gpu,
            help="The GPU: its name (H100, RTX 4090) or its memory (24GB, 80GiB). Default: this machine's.",
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus", min=1, help=("Number of GPUs. Default: all of this machine; on a cluster as few as suffice.")
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Write a first configuration that fits these GPUs by the plan, with the reason for each setting. On a terminal it
    asks for what no option gives.
    """
    from launcher.init.commented import check_new, write_new
    from launcher.init.initial import GOALS, KINDS, InitAnswers, initial_config

    check_new(config, force or dry_run)
    asks = sys.stdin.isatty() and not as_json
    goals = ", ".join(f"{name} ({known.about})" for name, known in GOALS.items())
    answers = InitAnswers(
        base=_answer(base, asks, "--base", "The base (a directory or a Hub id)"),
        data=_answer(data, asks, "--data", "The training data (a file or a data set of the Hub)"),
        goal=_answer(goal, asks and base is None, "--goal", f"The goal: {goals}", "sft"),
        machine=_answer(machine, asks and base is None, "--machine", f"Where it runs: {', '.join(KINDS)}", "one"),
        gpu=gpu,
        gpus=countable(gpus),
    )
    made = initial_config(answers, config)
    if not dry_run:
        write_new(config, made.config)
    if as_json:
        print(json.dumps({**asdict(made), "written": not dry_run}))
        return
    if dry_run:
        print(made.config, end="")
    log(f"{'would write' if dry_run else 'wrote'} {config}")
    for line in made.lines():
        log(line)


def _answer(given: str | None, asks: bool, option: str, question: str, otherwise: str | None = None) -> str:
    """Return the option's value, or ask for it if a person is there to answer."""
    if given is not None:
        if not given.strip():
            raise ConfigError(f"{option}: empty. Give it a value, or leave the option out.")
        return given
    if asks:
        with waiting_for_a_person():
            return str(typer.prompt(question, default=otherwise, err=True)).strip()
    if otherwise is None:
        raise ConfigError(f"{option}: missing. Give it, or call this in a terminal, where it is asked for.")
    return otherwise


def import_(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help=(
                "The other tool's YAML or JSON, a script with its command line, or a Python script or notebook. Several"
                " files make one configuration, such as TRL's and accelerate's."
            ),
        ),
    ],
    peer: Annotated[
        str | None,
        typer.Option(
            "--from",
            autocompletion=complete_peer,
            help=(
                "axolotl, llamafactory, llamafactory-v1, trl, accelerate, ms-swift, ms-swift-megatron or automodel."
                " Default: found out by the keys."
            ),
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(
            "--gpus",
            min=1,
            help="Number of GPUs that it ran on, which decides its batch. Default: as the file says, or 1.",
        ),
    ] = None,
    data_info: Annotated[
        Path | None,
        typer.Option("--data-info", help="LLaMA-Factory's dataset_info.json. Default: that of the file's dataset_dir."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to write the configuration. Default: stdout.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Turn another tool's configuration into one of Capstan's. Each key is carried over, or listed with the reason why
    not.
    """
    from launcher.init.commented import check_new, write_new
    from launcher.init.importing.importing import import_files
    from launcher.view.console import Terminal

    if output:
        check_new(output, force or dry_run)
    imported = import_files(files, peer, countable(gpus), data_info)
    if output and not dry_run:
        write_new(output, imported.text)
    if as_json:
        print(json.dumps({**imported.to_json(), "written": str(output) if output and not dry_run else None}))
        return
    Terminal(stderr=True).print(imported.table())
    if not output or dry_run:
        print(imported.text, end="")
    for line in imported.to_do:
        log(f"to do: {line}")
    log(imported.sentence())
    if output:
        log(
            f"{'would write' if dry_run else 'wrote'} {output}; capstan plan {shlex.quote(str(output))} says what it"
            " needs"
        )


def recipe(
    name: Annotated[
        str | None,
        typer.Argument(metavar="[NAME]", help="The recipe. Default: list all.", autocompletion=complete_recipe),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to write the configuration. Default: stdout.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="Write small data for a first try into this folder, too."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Write a configuration to start from: one for each line of models and each goal, planned for the GPUs that it
    names. Without a name, list them. --data writes rows for a first run.
    """
    from launcher.init.commented import check_new, write_new
    from launcher.init.recipes import FILES, FOLDER, recipe_rows, recipe_text, write_data

    if output and name is None:
        raise ConfigError("-o: needs the NAME of a recipe. `capstan recipe` lists them.")
    text = recipe_text(name, str(data or FOLDER)) if name else None
    if output:
        check_new(output, force or dry_run)
    said: list[str] = []
    if data:
        said = [f"{data / file}: {about}" for file, (about, _) in FILES.items()]
        said = said if dry_run else write_data(data, force=force)
    if output and text and not dry_run:
        write_new(output, text)
    if as_json:
        written = {"written": None if dry_run or not output else str(output), "data": said}
        print(json.dumps({"recipe": name, "config": text, **written} if name or data else {"recipes": recipe_rows()}))
        return
    would = "would write " if dry_run else "wrote "
    for line in said:
        log(f"{would}{line}")
    if text and (dry_run or not output):
        print(text, end="")
    if output:
        log(f"{would}{output}; next: capstan train {shlex.quote(str(output))}")
    if not name and not data:
        _show_recipes(recipe_rows())


def _show_recipes(rows: list[dict[str, Any]]) -> None:
    from launcher.view.console import FoldedTable, Terminal

    shown = FoldedTable()
    shown.add_column("recipe", no_wrap=True)  # a name is copied
    for name in ("base", "goal", "planned for"):
        shown.add_column(name)
    for row in rows:
        shown.add_row(*row.values())
    Terminal().print(shown)
    log("capstan recipe NAME -o run.yaml --data sample-data writes one, with small data for a first try")


VERBS = {
    "recipe": Command(recipe, "recipe smollm2-135m-chat -o my-run.yaml --data sample-data", 15),
    "init": Command(init, "init run.yaml --base /models/Llama-3.1-8B --data data/train.jsonl --gpu 24GB", 20),
    "import": Command(import_, "import axolotl.yml -o run.yaml", 30),
}
