"""One verb of `capstan`, and how verbs are found.

A file of launcher/cli/verbs names its verbs in `VERBS`, such as "train", or "data build" for one of a group, and what
it says of a group in `GROUPS`. Everything that a verb needs beyond its options is imported when it runs, as --help and
completion load all of these files.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Any, NamedTuple

from launcher.cli import verbs


class Command(NamedTuple):
    """The function of a verb, whose docstring is its help and whose arguments are its options; the words after
    `capstan` of an example, in which its help ends; its place in --help; and for options that somebody may look for,
    and that it does not have, what to write `instead`."""

    function: Callable[..., Any]
    example: str
    place: int = 200
    instead: Mapping[str, str] = MappingProxyType({})


def commands() -> list[tuple[str, Command]]:
    """Every verb, in the order of --help."""
    return sorted(_declared("VERBS").items(), key=lambda item: (item[1].place, item[0]))


def groups() -> dict[str, str]:
    """The help of each group of verbs."""
    return _declared("GROUPS")


def _declared(table: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module in iter_modules(verbs.__path__, f"{verbs.__name__}."):
        found |= getattr(import_module(module.name), table, {})
    return found
