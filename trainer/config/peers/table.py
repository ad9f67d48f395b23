"""The rows of a peer's table. A key of a peer is a setting of ours, or is not needed here, or is not supported, or it
makes the file another training than ours are; each says why.

A sentence about such a key answers people who write it into a configuration of ours.

The tables are the YAML files beside this one. docs/extending.md says how a key is added.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from trainer.config.peers import conversions
from trainer.config.peers.conversions import Conversion

OFF = (None, False, 0, "", "none", "None", "no", [], {})
"""The values with which a key asks for nothing."""


@dataclass(frozen=True)
class To:
    """The key is the setting `setting`, with its value converted. A conversion may give several settings, as a dict of
    them, and raises `Inconvertible`."""

    setting: str
    convert: Conversion


@dataclass(frozen=True)
class Together:
    """The key makes `setting` together with others: launcher/init/importing/ has a module a peer that does it."""

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


@dataclass(frozen=True)
class RefusedKey:
    """The key makes the file a training that Capstan has not, unless its value is one of `OFF`. Such a file is refused
    as a whole, because without the key it would be another training."""

    why: str


Row = To | Together | Needless | Unsupported | RefusedKey


@dataclass(frozen=True)
class Peer:
    """A tool whose configurations are read.

    Keys of sections are dotted, `[]` stands for each item of a list, and a last `*` for whatever is in a section.
    `defaults` are values of keys that are not given, where another value of ours would follow from their absence.
    `tables` are what the peer's module in launcher/init/importing/ looks up: the peer's words for formats, losses and
    the like.
    """

    name: str
    title: str
    rows: Mapping[str, Row]
    defaults: Mapping[str, Any]
    nullable: tuple[str, ...]
    tables: Mapping[str, Any]
    takes: str | None = None  # the peer whose rows and tables it takes over

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


@cache
def others() -> Mapping[str, Any]:
    """The tools whose files are recognised and not read, with what tells them."""
    return yaml.safe_load(Path(__file__).with_name("others.yaml").read_text(encoding="utf-8"))


@cache
def read_peer(name: str) -> Peer:
    """The peer of the table `name`, with the rows of the table that it takes over."""
    tree = yaml.safe_load((Path(__file__).parent / f"{name.replace('-', '_')}.yaml").read_text(encoding="utf-8"))
    taken = read_peer(tree["takes"]) if "takes" in tree else None
    rows = dict(taken.rows) if taken else {}
    for key in tree.get("without", "").split():
        del rows[key]
    rows.update(_rows(tree))
    for inner in tree.get("inside", ()):
        rows.update((f"{section}.{key}", row) for section in inner["of"].split() for key, row in _rows(inner))
    nullable = tuple(tree.get("nullable", "").split())
    tables = {**(taken.tables if taken else {}), **tree.get("tables", {})}
    return Peer(name, tree.get("title", name), rows, tree.get("defaults", {}), nullable, tables, tree.get("takes"))


def _rows(tree: Mapping[str, Any]) -> Iterator[tuple[str, Row]]:
    for key, given in tree.get("settings", {}).items():
        yield key, _to(given)
    for setting, keys in tree.get("together", {}).items():
        yield from ((key, Together(setting)) for key in keys.split())
    for group in tree.get("needless", ()):
        yield from ((key, Needless(group["why"])) for key in group["keys"].split())
    for group in tree.get("unsupported", ()):
        yield from ((key, Unsupported(group["why"], tuple(group.get("idle", OFF)))) for key in group["keys"].split())
    for group in tree.get("refused", ()):
        yield from ((key, RefusedKey(group["why"])) for key in group["keys"].split())


def _to(given: str | Mapping[str, Any]) -> To:
    """`setting conversion`; or a choice among names, `one_of`; or the settings that follow from a switch, `when`."""
    if isinstance(given, str):
        setting, name = given.split()
        return To(setting, getattr(conversions, name))
    if "one_of" in given:
        return To(given["setting"], conversions.one_of(given["one_of"], given["otherwise"]))
    setting = given.get("setting") or next(iter(given["when"]))
    return To(setting, conversions.when(given["when"], given.get("otherwise")))


_NAMES = "axolotl trl llamafactory accelerate llamafactory-v1 ms-swift ms-swift-megatron automodel"
PEERS = tuple(map(read_peer, _NAMES.split()))


SETTINGS_HERE, NONE_HERE = (To, Together), (Needless, Unsupported, RefusedKey)


def said_of(key: str, kinds: tuple[type[Row], ...]) -> str | None:
    """Return a sentence about a key of a peer: what the setting is called here, or why there is none. `kinds` says
    which of both is wanted. None if no peer has such a key.
    """
    for peer in PEERS:
        row = peer.rows.get(key) or next(
            (row for name, row in peer.rows.items() if name.rpartition(".")[2] == key and isinstance(row, kinds)), None
        )
        if isinstance(row, kinds):
            return _sentence(row, peer.title)
    return None


def _sentence(row: Row, title: str) -> str:
    if isinstance(row, To | Together):
        return f"It is {'' if isinstance(row, To) else 'part of '}{row.setting} here."
    needed = "needs no setting here" if isinstance(row, Needless) else "has no counterpart here"
    return f"That of {title} {needed}: {row.why}"
