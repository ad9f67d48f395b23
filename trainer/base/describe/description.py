"""Reads the config.json of a base, and derives the architecture and the format of the files from it.

Another person wrote the file, so it is checked before it is used. transformers reads it too, but may raise any error
for a mistake; here each mistake gives one sentence. Code that a base brings along (`auto_map`) is never run.

`unrecognised` finds parts that a config.json names but the description lacks, so that its sizes are wrong. A plan for
such a base may be wrong by a factor of several, so it says so and gives no verdict.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from trainer.base.architecture import Architecture
from trainer.base.base import Description, StoredFormat
from trainer.base.describe.architecture_cache import read_architecture
from trainer.config.registry import kinds
from trainer.errors import NOT_JSON, ConfigError, shown

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
    given, known = quantization or {}, kinds("trainer.base.stored", "STORED")
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
"""The places where trainer/base/describe/description.py reads them, the last one beside a quantization_config."""
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


_MOST_LAYERS = 10_000
_MOST_EXPERTS = 10_000
_MOST_EXPERTS_IN_ALL = 2**17  # the largest models have some 25,000; each expert has its own names in the files
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MAY_BE_NONE = (*EXPERT_COUNTS, "head_dim", "n_shared_experts", "moe_num_shared_experts", "num_experts_per_tok")
# Sizes in config.json -> the largest allowed value. Code makes lists as long as the number of layers and experts.
_SIZES = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size"), 2**31),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "max_position_embeddings"), 2**31),
    **dict.fromkeys(_MAY_BE_NONE, _MOST_EXPERTS),
    "head_dim": 2**31,
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer"), _MOST_LAYERS),
}
_MAY_BE_LISTS = (*_MAY_BE_NONE, "intermediate_size", "moe_intermediate_size")
_CAPS = ("final_logit_softcapping", "attn_logit_softcapping")


def parse_base_config(name: str, data: bytes) -> dict[str, Any]:
    """The config.json of the base `name`.

    Raises:
        ConfigError: it is not JSON, or has impossible sizes or types.
    """
    try:
        config = json.loads(data)
    except NOT_JSON as error:
        raise ConfigError(f"model.base: {name}/config.json is not JSON ({error}). Copy the model again.") from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"model.base: {name}/config.json is no JSON object, but {shown(config)}. Copy the model again."
        )
    for section in (config, *(value for value in config.values() if isinstance(value, dict))):
        _check_sizes(name, section)
    for section in (config, _text_config(config)):
        _check_quantization(name, section.get("quantization_config"))
    return config


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the parsed config.json that says how the weights are stored. {} if there is none.

    It is the quantization_config, or that of the text_config. In DeepSeek-V4 the `expert_dtype` stands beside it, at
    the top level, and is added."""
    experts = {"expert_dtype": config["expert_dtype"]} if config.get("expert_dtype") else {}
    found = config.get("quantization_config") or _text_config(config).get("quantization_config")
    return {**experts, **found} if found else {}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the plain base that corresponds to a quantized one."""
    left = {key: value for key, value in config.items() if key not in ("quantization_config", "expert_dtype")}
    if text := _text_config(config):
        left["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    return left


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The section for the language model, if the base also processes pictures or sound."""
    section = config.get("text_config")
    return section if isinstance(section, dict) else {}


def _check_quantization(name: str, stored: Any) -> None:
    if stored is not None and not isinstance(stored, dict):
        raise ConfigError(
            f"model.base: {name}/config.json has the quantization_config {shown(stored)}, which is no JSON object. Copy"
            " the model again."
        )
    if stored == {}:
        raise ConfigError(
            f"model.base: {name}/config.json has an empty quantization_config, which transformers cannot read. Remove"
            " it from there."
        )


def _check_sizes(name: str, config: dict[str, Any]) -> None:
    """Check the sizes of the model, or of a part of it, such as its text_config."""
    for key, largest in _SIZES.items():
        if key == "max_position_embeddings" and "text_config" in config:
            continue  # of the tower for sounds, in seconds: Music Flamingo
        value, least = config.get(key), 0 if key in _MAY_BE_NONE else 1
        # Layers, or the parts of a vision model, may differ in size: then the value is a list.
        every = value if key in _MAY_BE_LISTS and isinstance(value, list) else [value]
        if value is not None and not all(type(size) is int and least <= size <= largest for size in every):
            raise ConfigError(
                f"model.base: {name}/config.json has {key} {shown(value)}. Possible are whole numbers from {least} to"
                f" {largest}. Copy the model again."
            )
    for key in _CAPS:
        value = config.get(key)
        if value is not None and not (type(value) in (int, float) and 0 < value < 2**31):
            raise ConfigError(
                f"model.base: {name}/config.json has {key} {shown(value)}. Possible are positive numbers and null. Copy"
                " the model again."
            )
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and shared and heads % shared:
        raise ConfigError(
            f"model.base: {name}/config.json has {heads} num_attention_heads, which {shared} num_key_value_heads do not"
            " divide. Copy the model again."
        )
    layers, experts = (
        config.get("num_hidden_layers"),
        next((config[key] for key in EXPERT_COUNTS if config.get(key)), None),
    )
    most = max(experts) if isinstance(experts, list) else experts
    if layers and most and layers * most > _MOST_EXPERTS_IN_ALL:
        raise ConfigError(
            f"model.base: {name}/config.json has {layers} num_hidden_layers of {most} experts each. Possible are "
            f"{_MOST_EXPERTS_IN_ALL} experts in all. Copy the model again."
        )
    active = config.get("num_experts_per_tok")
    if isinstance(active, int) and isinstance(experts, int) and active > experts:
        raise ConfigError(
            f"model.base: {name}/config.json has {active} num_experts_per_tok, but {experts} experts. Copy the model"
            " again."
        )
