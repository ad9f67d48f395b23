"""Reads a peer's file as a tree of plain values, and finds out which peer it belongs to."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher.init.importing.command_line import COMPUTED, is_command, read_command
from launcher.init.importing.script import notebook_code, read_script
from trainer.config.peers.table import Peer, others
from trainer.config.reading import read_yaml
from trainer.errors import ConfigError, shown

ROWS = "(rows)"
_REFERENCE = re.compile(r"\$\{([^{}]+)\}")
_MOST_REFERENCES = 20


def read_peer_file(path: Path) -> dict[str, Any]:
    """Return the keys of a file.

    It is YAML (which includes JSON), a command line with `--key value`, in a shell script or by itself, or a Python
    script or notebook of TRL's. `COMPUTED` lists sentences on the values that a script computes.

    Raises:
        ConfigError: the file cannot be read, or is none of these.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"the file {shown(str(path))} cannot be read: {error}.") from error
    if path.suffix in (".py", ".ipynb"):
        code = notebook_code(text, str(path)) if path.suffix == ".ipynb" else text
        keys, open_values, rows = read_script(code, str(path))
        return {**keys, **({COMPUTED: open_values} if open_values else {}), **({ROWS: rows} if rows else {})}
    if is_command(text, path):
        return read_command(text, str(path), _keys_in)
    return _keys_in(text, str(path))


def _keys_in(text: str, path: str) -> dict[str, Any]:
    tree = read_yaml(text, path, repeated=True)
    if not isinstance(tree, dict) or not tree:
        raise ConfigError(f"{path} holds no keys of a configuration, and no command line with --key value.")
    named = {str(key): value for key, value in tree.items()}
    return {key: _followed(value, named, ()) for key, value in named.items()}


def _followed(value: Any, root: dict[str, Any], seen: Sequence[str]) -> Any:
    """Return `value` with references such as `${output_dir}/logs` replaced, as OmegaConf does."""
    if isinstance(value, dict):
        return {str(key): _followed(item, root, seen) for key, item in value.items()}
    if isinstance(value, list):
        return [_followed(item, root, seen) for item in value]
    if not isinstance(value, str) or len(seen) > _MOST_REFERENCES:
        return value
    if whole := _REFERENCE.fullmatch(value.strip()):
        return _target(whole[1], root, seen, value)
    return _REFERENCE.sub(lambda found: str(_target(found[1], root, seen, found[0])), value)


def _target(name: str, root: dict[str, Any], seen: Sequence[str], otherwise: str) -> Any:
    if name.startswith(("env:", "oc.env:")):
        variable, _, default = name.partition(":")[2].partition(",")
        return os.environ.get(variable, default or otherwise)
    node: Any = root
    for part in name.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return otherwise if node is None or name in seen else _followed(node, root, [*seen, name])


def flat_keys(tree: dict[str, Any], peer: Peer, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of `tree` with its value, dotted as far as the peer's table lists keys inside.

    An empty section asks for nothing, so it is a key only if the table says what it means.
    """
    for name, value in tree.items():
        key = f"{prefix}{name}"
        general = re.sub(r"\[\d+\]", "[]", key)
        if isinstance(value, dict) and peer.opens(general) and (value or peer.row(general) is None):
            yield from flat_keys({str(inner): item for inner, item in value.items()}, peer, f"{key}.")
        elif isinstance(value, list) and any(row.startswith(f"{general}[].") for row in peer.rows):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    yield from flat_keys({str(inner): part for inner, part in item.items()}, peer, f"{key}[{index}].")
                else:
                    yield f"{key}[{index}]", item
        else:
            yield key, value


def refuse_others(tree: dict[str, Any], program: str | None, path: str) -> None:
    """Refuse a file of a tool that is recognised but not read: some of its keys have the same names as other tools'.

    Raises:
        ConfigError: it is of such a tool.
    """
    for name, signs in others().items():
        lines = [line.split() for line in signs["keys"]]
        if program in signs.get("programs", "").split() or any(all(_has(tree, key) for key in keys) for keys in lines):
            raise ConfigError(
                f"{path} is a file of {name}, which `capstan import` does not read. Write a configuration by `capstan"
                " init`; docs/migration.md says what the settings of other tools are called here. Nothing was written."
            )


def _has(tree: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def marked(tree: dict[str, Any], peers: Sequence[Peer]) -> Peer | None:
    """Return the peer of whose marks the file has most."""
    lines = [(len(line.split()), line.split(), peer) for peer in peers for line in peer.tables.get("marks", ())]
    found = [(size, peer) for size, line, peer in lines if all(_has(tree, key) for key in line)]
    return max(found, key=lambda one: one[0])[1] if found else None


def detect(tree: dict[str, Any], peers: Sequence[Peer], path: str) -> Peer:
    """Return the peer whose marks the file has, or else the one that knows most of the keys.

    Raises:
        ConfigError: no peer knows a key, or two know as many.
    """
    if {"run", "model", "data", "train"} <= set(tree):
        raise ConfigError(f"{path} is a configuration of Capstan already: capstan plan {path} says what it needs.")
    if found := marked(tree, peers):
        return found
    keys = list(map(str, tree))
    counts = [(sum(peer.row(key) is not None or peer.opens(key) for key in keys), peer) for peer in peers]
    best = max(count for count, _ in counts)
    found = [peer for count, peer in counts if count == best]
    found = [peer for peer in found if peer.takes not in {other.name for other in found}]
    names = ", ".join(peer.name for peer in peers)
    if not best:
        raise ConfigError(f"{path}: none of its keys belongs to {names}. Say which tool it is for: --from NAME.")
    if len(found) > 1:
        same = " and ".join(peer.name for peer in found)
        raise ConfigError(f"{path}: its keys fit {same}. Say which tool it is for: --from NAME.")
    return found[0]
