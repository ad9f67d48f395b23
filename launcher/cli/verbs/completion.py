"""The verb that prints the completion of a shell."""

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


VERBS = {"completion": Command(completion, "completion bash", 180)}
