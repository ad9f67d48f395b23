"""Kinds of one thing, each a file or a folder in one place, which a setting chooses by name, such as methods.

Importing them loads no torch, as `plan` counts on a login node. The `__init__.py` of a folder is the kind; code for
tensors lies beside it.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from trainer.errors import ConfigError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

Kind = TypeVar("Kind")


def kinds(package: str, table: str) -> dict[str, Any]:
    """All entries of the dictionaries called `table` in the files and folders of a package; those without one have no
    kind.
    """
    return {name: kind for module in modules_of(package) for name, kind in getattr(module, table, {}).items()}


def modules_of(package: str) -> Sequence[ModuleType]:
    """The files and folders of a package. Only the `__init__.py` of a folder is imported."""
    return _modules(package, tuple(import_module(package).__path__))


@cache
def _modules(package: str, path: tuple[str, ...]) -> Sequence[ModuleType]:
    """A plan asks a hundred times, and each time it is files that are looked for."""
    return tuple(import_module(f"{package}.{module.name}") for module in iter_modules(path))


@dataclass(frozen=True)
class OneOf:
    """In the annotation of a setting: it is the name of one of these kinds. A file's `ABOUT` has a clause on each of
    its kinds, by its name.

    The files are read when somebody asks, as they import the configuration.
    """

    package: str
    table: str

    def about(self) -> dict[str, str]:
        """Every name, and the clause on it."""
        clauses = kinds(self.package, "ABOUT")
        return {name: clauses.get(name, "") for name in sorted(kinds(self.package, self.table))}

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        """Names and clauses, for completion in an editor."""
        named = (
            {"const": name, "description": words} if words else {"const": name} for name, words in self.about().items()
        )
        return {**handler(core), "oneOf": list(named)}


def one_of(field: FieldInfo) -> list[OneOf]:
    """The kinds whose names a setting takes, or a list of them; none where it takes other values."""
    inside = [part for kind in get_args(field.annotation) for part in get_args(kind)]
    return [part for part in (*field.metadata, *inside) if isinstance(part, OneOf)]


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
