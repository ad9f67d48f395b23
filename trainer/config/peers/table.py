"""The rows of a peer's table. A key of a peer is a setting of ours, or is not needed here, or is not supported; each says why."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

OFF = (None, False, 0, "", "none", "None", "no", [], {})
"""The values with which a key asks for nothing."""


class Inconvertible(ValueError):
    """The value has no counterpart among our settings; the text is a sentence that says why, and what holds instead."""


@dataclass(frozen=True)
class To:
    """The key is the setting `setting`, with its value converted. A conversion may give several settings, as a dict of them, and
    raises `Inconvertible`."""

    setting: str
    convert: Callable[[Any], Any]


@dataclass(frozen=True)
class Together:
    """The key makes `setting` together with others: launcher/importing/ has a module a peer that does it."""

    setting: str


@dataclass(frozen=True)
class Needless:
    """The key changes nothing here, and nothing is lost without it."""

    why: str


@dataclass(frozen=True)
class Unsupported:
    """The key asks for what Capstan does not do, unless its value is one of `idle`."""

    why: str
    idle: tuple[Any, ...] = OFF


Row = To | Together | Needless | Unsupported


@dataclass(frozen=True)
class Peer:
    """A tool whose configurations are read.

    Keys of sections are dotted, `[]` stands for each item of a list, and a last `*` for whatever is in a section. `defaults` are
    values of keys that are not given, where another value of ours would follow from their absence.
    """

    name: str
    title: str
    rows: Mapping[str, Row]
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    nullable: tuple[str, ...] = ()

    def row(self, key: str) -> Row | None:
        """The row of a key, or of the nearest section around it that is listed as a whole."""
        if key in self.rows:
            return self.rows[key]
        parts = key.split(".")
        around = (".".join([*parts[:end], "*"]) for end in range(len(parts) - 1, 0, -1))
        return next((self.rows[section] for section in around if section in self.rows), None)

    def opens(self, key: str) -> bool:
        """Whether the table lists keys inside of this one."""
        return any(name.startswith((f"{key}.", f"{key}[].")) for name in self.rows)


def each(kind: Callable[[str], Row], keys: Mapping[str, str]) -> dict[str, Row]:
    """Rows of one kind from {reason: keys, with blanks between them}."""
    return {key: kind(reason) for reason, names in keys.items() for key in names.split()}
