"""Reads the config.json of a base. Another person wrote the file, so it is checked before it is used.

transformers reads it too, but may raise any error for a mistake; here each mistake gives one sentence. Code that a base
brings along (`auto_map`) is never run.
"""

import json
from collections.abc import Mapping
from typing import Any

from trainer.errors import NOT_JSON, ConfigError, shown

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
