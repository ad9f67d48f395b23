"""Finds out which layers stay in 16 bits, from the lists in a quantization_config."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from trainer.base.architecture import Parameter


def is_listed(parameter: Parameter, names: Sequence[str] | None) -> bool:
    """Whether `names` include the module of `parameter`; for a mixture's experts, the module of the first expert.

    A name is a part of a path, a path with wildcards, or `re:` and a pattern for the beginning of a path."""
    path = parameter.name.removesuffix(".weight")
    paths = [path]
    if parameter.kind == "experts":
        before, _, leaf = path.rpartition(".")
        paths = [f"{before}.0.{part}" for part in (leaf, leaf.replace("gate_up", "gate"))] + [path]
    # A model that also processes pictures has its language model under another path.
    paths += [f"language_model.{one}" for one in paths]
    return any(_names(name, path) for name in names or () for path in paths)


def _names(name: str, path: str) -> bool:
    if name.startswith("re:"):
        return re.match(name.removeprefix("re:"), path) is not None
    return f".{name}." in f".{path}." or fnmatchcase(path, name)
