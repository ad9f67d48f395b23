"""Derives the architecture and the format of the files from a parsed config.json."""

import re
from dataclasses import replace
from typing import Any

from trainer.base.architecture import Architecture
from trainer.base.base import Description, StoredFormat
from trainer.base.describe.architecture_cache import read_architecture
from trainer.base.describe.config_json import quantization_of
from trainer.base.describe.unrecognised import unrecognised
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
