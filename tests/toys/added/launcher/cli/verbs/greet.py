"""A toy verb."""

from typing import Annotated

import typer

from launcher.cli.command import Command


def greet(loud: Annotated[bool, typer.Option("--loud", help="In capital letters.")] = False) -> None:
    """Say hello."""
    print("HELLO" if loud else "hello")


VERBS = {"greet": Command(greet, "greet --loud")}
