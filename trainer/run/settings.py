"""The settings that each start of a run trained with, and what changed from one start to the next."""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from trainer.config import Config, dump_config
from trainer.config.reading import read_yaml
from trainer.config.secrets import masked
from trainer.errors import ConfigError, NotFound
from trainer.run import layout
from trainer.store.store import Store

_PLACE = ("run.name", "run.store")
"""Where the run is, which a copied or moved folder changes."""


class Change(NamedTuple):
    """A setting by its dotted name, with its value before and after. Neither shows a secret of an earlier version."""

    setting: str
    old: Any
    new: Any

    def sentence(self) -> str:
        return f"{self.setting} is {json.dumps(self.new)} from now on; it was {json.dumps(self.old)}"


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Return the settings that differ between two configurations, given as trees. The place of the run is left out."""
    before, after = dict(leaves(old)), dict(leaves(new))
    return [
        Change(name, masked(before.get(name), name), masked(after.get(name), name))
        for name in after | before
        if name not in _PLACE and before.get(name) != after.get(name)
    ]


def record_settings(folder: Store, generation: int, config: Config) -> list[Change]:
    """Record what this start trains with.

    Returns what changed since the last start that trained, as far as its settings can be read.
    """
    keys = [entry.key for entry in folder.list(layout.SETTINGS) if entry.key < layout.settings(generation)]
    folder.put(layout.settings(generation), dump_config(config).encode())
    earlier = next(filter(None, (_kept(folder, key) for key in sorted(keys, reverse=True))), None)
    return changes(earlier, config.model_dump(mode="json")) if earlier else []


def _kept(folder: Store, key: str) -> dict[str, Any] | None:
    """Read the settings under `key`; None if they are damaged or gone."""
    with suppress(ConfigError, NotFound):
        if isinstance(tree := read_yaml(folder.get(key), key), dict):
            return tree
    return None


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting of a configuration, given as a tree, as (dotted name, value)."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
