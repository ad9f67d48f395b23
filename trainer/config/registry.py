"""Kinds of one thing that are a file each in a folder, and are chosen by name in a setting: methods and objectives.

Importing the files loads no torch, as `plan` counts on a login node.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, TypeVar

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel

Kind = TypeVar("Kind")


def kinds(package: str, table: str, speaks: str = "method") -> dict[str, Any]:
    """All entries of the dictionaries called `table` in the package's files; a file without one has no kind of its own.
    A kind with parts of its own is a folder there, for which its file `speaks` has the table."""
    return dict(_kinds(package, tuple(import_module(package).__path__), table, speaks))


@cache
def _kinds(package: str, path: tuple[str, ...], table: str, speaks: str) -> dict[str, Any]:
    """A plan asks a hundred times, and each time it is files that are looked for."""
    found: dict[str, Any] = {}
    for module in iter_modules(path):
        name = f"{package}.{module.name}" + (f".{speaks}" if module.ispkg else "")
        if module.ispkg and find_spec(name) is None:
            continue
        found |= getattr(import_module(name), table, {})
    return found


def chosen(known: Mapping[str, Kind], setting: str, name: str) -> Kind:
    """The kind called `name`, which `setting` gave. Raises `ConfigError` where there is none, with the nearest name."""
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise ConfigError(f"{setting}: {name!r} is not allowed. Allowed are {', '.join(sorted(known))}.{hint}")
    return known[name]


def refuse_unread(section: BaseModel, setting: str, read: Collection[str]) -> None:
    """Raise `ConfigError` for a value in the section of `setting`, such as tuning.method, that its choice does not
    read.
    """
    where, _, choice = setting.partition(".")
    for name, field in type(section).model_fields.items():
        if name not in (choice, *read) and getattr(section, name) != field.default:
            raise ConfigError(f"{where}.{name}: has no effect with {setting}: {getattr(section, choice)}. Remove it.")


def without_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`given` without the values that are as in `defaults`: an identity stays what it is when a setting is added."""
    return {key: value for key, value in given.items() if key not in defaults or value != defaults[key]}
