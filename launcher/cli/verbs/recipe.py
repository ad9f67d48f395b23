"""The verb that writes a configuration to start from, and small data for it."""

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli.command import Command, DryRun, Force, Json, log
from launcher.cli.shell import complete_recipe
from trainer.errors import ConfigError


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
    from launcher.init.recipes.data import FILES, FOLDER, write_data
    from launcher.init.recipes.recipe import recipe_rows, recipe_text

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
        _show(recipe_rows())


def _show(rows: list[dict[str, Any]]) -> None:
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
}
