"""The verb that turns another tool's configuration into one of Capstan's."""

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli.command import Command
from launcher.cli.options import DryRun, Force, Json, countable, log
from launcher.cli.shell import complete_peer


def import_(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help=(
                "The other tool's YAML or JSON, or a script with its command line. Several files make one"
                " configuration, such as TRL's and accelerate's."
            ),
        ),
    ],
    peer: Annotated[
        str | None,
        typer.Option(
            "--from",
            autocompletion=complete_peer,
            help=("axolotl, llamafactory, llamafactory-v1, trl or accelerate. Default: found out by the keys."),
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=1, help=("Number of GPUs that it ran on, which decides its batch. Default: 1.")),
    ] = None,
    data_info: Annotated[
        Path | None,
        typer.Option("--data-info", help="LLaMA-Factory's dataset_info.json. Default: as the file's dataset_dir says."),
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
        check_new(output, force)
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


VERBS = {
    "import": Command(import_, "import axolotl.yml -o run.yaml", 30),
}
