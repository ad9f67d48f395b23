"""Overrides of settings, `key.path=value`, and what they replace of the configuration beside their own setting."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from trainer.config.reading.yaml_reader import read_yaml
from trainer.config.registry import kinds
from trainer.errors import ConfigError, shown

_MOST_SECTIONS = 8


class _Exclusion(NamedTuple):
    """A setting that takes the place of others where it has a value for which `when` is true."""

    setting: str
    others: tuple[str, ...]
    when: Callable[[Any], bool] = bool


_EXCLUSIONS = (
    _Exclusion("train.steps", ("train.epochs",)),
    _Exclusion("train.epochs", ("train.steps",)),
    _Exclusion("eval.every", ("eval.per_epoch",)),
    _Exclusion("eval.per_epoch", ("eval.every",)),
    _Exclusion("data.held_out", ("data.eval",)),
    _Exclusion("data.eval", ("data.held_out", "data.held_out_seed")),
    _Exclusion("optim.warmup_steps", ("optim.warmup_ratio",)),
    _Exclusion("optim.warmup_ratio", ("optim.warmup_steps",)),
    _Exclusion("quant.type", ("quant.double",), lambda kind: _leaves_unread(kind, "double")),
    _Exclusion("quant.type", ("quant.cache",), lambda kind: _leaves_unread(kind, "cache")),
)


def _leaves_unread(kind: Any, setting: str) -> bool:
    """Whether a `quant.type` does not read a setting of `quant`."""
    held = kinds("trainer.model.held.formats", "HELD").get(kind)
    return held is not None and held.unread(setting) is not None


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str], name: str, say: Callable[[str], None]) -> None:
    """Change `tree`, the configuration called `name`, by `overrides`; the last of one key counts.

    A setting of the tree that an override contradicts is removed, and `say` gets a sentence about it. Overrides that
    contradict each other stay both, for the settings themselves to refuse.

    Raises:
        ConfigError: an override is not `key=value`, its value is not YAML, or its key leads through a value.
    """
    given = dict[str, Any]()
    for override in overrides:
        key, value, lost = _apply(tree, override)
        given |= _leaves(key, value)
        if lost:
            say(f"{key}={shown(value)} replaces all of {key} in {name}, also {', '.join(lost)}.")
    for setting, others, when in _EXCLUSIONS:
        for other in others if setting in given and when(given[setting]) else ():
            if other not in given and (replaced := _remove(tree, other.split("."))):
                say(f"{setting}={shown(given[setting])} replaces {other}: {shown(replaced)} of {name}.")


def _apply(tree: dict[str, Any], override: str) -> tuple[str, Any, list[str]]:
    """Change `tree`; returns the key, its value, and the settings of a section that are gone, as the value gives the
    section anew.
    """
    key, equals, value = override.partition("=")
    name = f"override {shown(override)}"
    if not equals or not key:
        raise ConfigError(f"{name}: expected key=value. Example: train.steps=20.")
    *sections, leaf = key.split(".")
    if len(sections) > _MOST_SECTIONS:
        raise ConfigError(f"{name}: no setting has so many dots in its name.")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{name}: {section!r} is a value, not a section.")
        node = child
    before, node[leaf] = node.get(leaf), read_yaml(value, name)
    if not isinstance(before, dict) or not isinstance(node[leaf], dict):
        return key, node[leaf], []
    return key, node[leaf], [str(inside) for inside in before if inside not in node[leaf]]


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The settings that an override of a whole section gives, or the one that it is itself."""
    if not isinstance(value, dict):
        yield key, value
        return
    for name, inside in value.items():
        yield from _leaves(f"{key}.{name}", inside)


def _remove(tree: Any, path: Sequence[str]) -> Any:
    """Remove a setting and return the value that it had; None where it has none."""
    *sections, leaf = path
    for section in sections:
        tree = tree.get(section) if isinstance(tree, dict) else None
    return tree.pop(leaf, None) if isinstance(tree, dict) else None
