"""One verb of `capstan`, and how verbs are found.

A file of launcher/cli/verbs names its verbs in `VERBS`, such as "train", or "data build" for a verb of a group. Its
`GROUPS` describes groups. A verb imports everything beyond its options when it runs, because --help and completion load
all of these files.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from pkgutil import iter_modules
from types import MappingProxyType
from typing import Any, NamedTuple

from launcher.cli import verbs


class Command(NamedTuple):
    """The function of a verb: its docstring is the help, and its arguments are the options.

    The other fields are the words after `capstan` of the example that ends the help, the verb's place in --help, and
    what to write `instead` of options that the verb does not have but somebody may look for.
    """

    function: Callable[..., Any]
    example: str
    place: int = 200
    instead: Mapping[str, str] = MappingProxyType({})


def commands() -> list[tuple[str, Command]]:
    """Return every verb, in the order of --help."""
    return sorted(_declared("VERBS").items(), key=lambda item: (item[1].place, item[0]))


def groups() -> dict[str, str]:
    """Return the help of each group of verbs."""
    return _declared("GROUPS")


def _declared(table: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module in iter_modules(verbs.__path__, f"{verbs.__name__}."):
        found |= getattr(import_module(module.name), table, {})
    return found
