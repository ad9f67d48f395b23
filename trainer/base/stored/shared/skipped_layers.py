"""Which layers the lists of a quantization_config name, those that stay in 16 bits."""

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from trainer.base.architecture import Parameter


def is_listed(parameter: Parameter, names: Sequence[str] | None) -> bool:
    """Whether the names, each a part of a path, a path with wildcards, or `re:` and a pattern that a path begins with,
    are those of the module of `parameter`; of a mixture's experts, of the first one."""
    path = parameter.name.removesuffix(".weight")
    paths = [path]
    if parameter.kind == "experts":
        before, _, leaf = path.rpartition(".")
        paths = [f"{before}.0.{part}" for part in (leaf, leaf.replace("gate_up", "gate"))] + [path]
    # A model that sees has its language model under another path.
    paths += [f"language_model.{one}" for one in paths]
    return any(_names(name, path) for name in names or () for path in paths)


def _names(name: str, path: str) -> bool:
    if name.startswith("re:"):
        return re.match(name.removeprefix("re:"), path) is not None
    return f".{name}." in f".{path}." or fnmatchcase(path, name)
