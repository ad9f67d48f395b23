"""Verbs for shells and editors: the script that completes commands, and the schema of the configuration."""

import json
from importlib.resources import files
from typing import Annotated, Literal

import typer

from launcher.cli.command import Command


def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="The shell.")],
) -> None:
    """Print the script with which a shell completes verbs, options, runs and settings; docs/quickstart.md says where to
    put it.
    """
    print(files("launcher.cli").joinpath(f"completion.{shell}").read_text(encoding="utf-8"), end="")


def config_schema() -> None:
    """Print the JSON Schema of the configuration, for editors."""
    from trainer.config import Config

    print(json.dumps(Config.model_json_schema(), indent=2))


GROUPS = {
    "config": "The configuration's schema.",
}

VERBS = {
    "completion": Command(completion, "completion bash", 180),
    "config schema": Command(config_schema, "config schema", 323),
}
