"""A toy verb."""

from typing import Annotated

import typer

from launcher.cli.command import Command


def greet(loud: Annotated[bool, typer.Option("--loud", help="In capital letters.")] = False) -> None:
    """Say hello."""
    print("HELLO" if loud else "hello")


def greet_all() -> None:
    """Say hello to everybody."""
    print("hello, all")


VERBS = {"greet": Command(greet, "greet --loud"), "greetings all": Command(greet_all, "greetings all")}
GROUPS = {"greetings": "Ways to say hello."}
