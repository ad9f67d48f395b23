"""Derives the architecture and the format of the files from a parsed config.json.

It also finds parts that a config.json names but the description lacks, so that its sizes are wrong. A plan for such a
base may be wrong by a factor of several, so it says so and gives no verdict.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from trainer.base.architecture import Architecture
from trainer.base.base import Description, StoredFormat
from trainer.base.describe.config_json import quantization_of
from trainer.base.describe.torch_answers import read_architecture
from trainer.config.registry import kinds
from trainer.errors import ConfigError, shown

# The keys of a quantization_config that distinguish the kinds of one method.
_KINDS = ("quant_algo", "format", "expert_dtype", "load_in_8bit", "bits")


def describe(base_config: dict[str, Any], layers: int | None = None, *, name: str = "the base") -> Description:
    """Describe a base from its parsed config.json, cut to its first `layers`. Messages call it `name`.

    Raises:
        ConfigError: its kind or its format is not supported.
    """
    stored = stored_format(quantization_of(base_config), name)
    architecture = _with_kept(read_architecture(base_config, layers, name=name), stored)
    return Description(architecture, stored, tuple(unrecognised(base_config, architecture)))


def _with_kept(architecture: Architecture, stored: StoredFormat) -> Architecture:
    """The architecture, extended by how the files hold its weights."""
    try:
        kept = [stored.kept(parameter) for parameter in architecture.parameters]
    except (LookupError, TypeError, ValueError, AttributeError, re.error):  # `mismatches` reports it
        return architecture
    if not any(kept):
        return architecture
    parameters = (replace(parameter, kept=how) for parameter, how in zip(architecture.parameters, kept, strict=True))
    return replace(architecture, parameters=tuple(parameters))


def stored_format(quantization: dict[str, Any] | None, name: str) -> StoredFormat:
    """The format that the quantization_config of the base `name` describes. Raises `ConfigError` if none is known."""
    given, known = quantization or {}, kinds("trainer.base.stored", "STORED", speaks="format")
    for stored in known.values():
        if stored.stores(given):
            return stored(given)
    told = [f"{key} {shown(given[key])}" for key in _KINDS if given.get(key)]
    details = f" ({', '.join(told)})" if told else ""
    *most, last = sorted((stored.readable for stored in known.values()), key=str.casefold)
    raise ConfigError(
        f"model.base: {name} is stored by {shown(given.get('quant_method'))}{details}, which cannot be read. Readable"
        f" are {', '.join(most)} and {last}. Give the 16-bit model; quant.type quantizes it."
    )


_FORMATS = ("quantization_config", "compression_config", "expert_dtype")
"""Keys that tell of weights in fewer bits."""
_READ = ("quantization_config", "text_config.quantization_config", "expert_dtype")
"""The places where trainer/base/describe/config_json.py reads them, the last one beside a quantization_config."""
_EXPERTS = re.compile(r"(moe_)?(num|n)_(local_|routed_)?experts")
_ROUTED = re.compile(r"top_?k|per_tok")


def unrecognised(base_config: Mapping[str, Any], architecture: Architecture) -> list[str]:
    """One sentence for each part in the parsed config.json that the sizes of the base do not include."""
    found, entries = list[str](), list(_entries(base_config))
    read = _READ if quantization_of(base_config) else ()
    routes = any(part.visits < 1 for part in architecture.parameters)
    for path, value in entries:
        key = path.rpartition(".")[2]
        if key in _FORMATS and value and path not in read:
            found.append(
                f"config.json names {path}, which is not read: its weights are counted as they are without it."
            )
        elif _EXPERTS.fullmatch(key) and _is_several(value) and not routes and not _routes_to_all(entries, value):
            found.append(
                f"config.json names {value} experts ({path}), and none is recognised to which tokens are routed: all"
                " weights are counted as ones that each token passes."
            )
    return found


def _entries(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each key of the tree by its path, except those in the section of a stored format."""
    for key, value in tree.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict) and key not in _FORMATS:
            yield from _entries(value, f"{prefix}{key}.")


def _is_several(value: Any) -> bool:
    return isinstance(value, int) and value > 1


def _routes_to_all(entries: list[tuple[str, Any]], experts: int) -> bool:
    """Whether each token is routed to all of the experts."""
    return any(_ROUTED.search(path) and isinstance(value, int) and value >= experts for path, value in entries)
