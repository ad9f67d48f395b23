"""transformers' settings of a base's language model, cut to its first layers.

If the base also processes pictures or sound, they are a part of its settings.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import transformers
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto import tokenization_auto
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from trainer.base.describe.language_part import is_part
from trainer.base.describe.trial.small import BY_LAYER
from trainer.errors import ConfigError, shown

SHARED = "num_kv_shared_layers"  # the number of last layers that share keys


def model_config(directory: Path, layers: int | None) -> PretrainedConfig:
    """transformers' configuration of the language model of a base, cut to its first `layers`.

    It is that of the whole model if the language model has no class of its own."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    given = json.loads((directory / "config.json").read_bytes())
    return first_layers(causal(config, str(directory), given), layers)[0]


def unknown(base_config: Mapping[str, Any], name: str) -> str:
    kind, classes = base_config.get("model_type"), base_config.get("architectures")
    code = " Its own code (auto_map) is never run." if base_config.get("auto_map") else ""
    said = (
        f"model.base: {name} is a {shown(kind)} model, which transformers {transformers.__version__} does not"
        f" know.{code}"
    )
    for known, made in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if isinstance(classes, list) and made in classes and made.lower().startswith(known.replace("_", "")):
            return (
                f'{said} Its "architectures" are those of another: write "model_type": "{known}" into its config.json.'
            )
    return f"{said} Give a causal language model that it knows."


def causal(config: PretrainedConfig, name: str, given: Mapping[str, Any]) -> PretrainedConfig:
    """The settings of the language model within those of a base, which may also process pictures or sound.

    `given` is the base's config.json. It tells a setting from a default of its type.
    """
    kind = config.model_type
    if config.is_encoder_decoder:
        raise ConfigError(
            f"model.base: {name} is a {kind} model, an encoder with a decoder. Give a causal language model."
        )
    text = config.get_text_config()
    if is_part(config):
        return config
    is_known = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if text is not config and not is_known:
        raise ConfigError(
            f"model.base: {name} is a {kind} model, for which transformers {transformers.__version__} has no class that"
            " predicts tokens. Give another base."
        )
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING and text is not config:
        raise ConfigError(
            f"model.base: {name} is a {kind} model, for whose language model ({text.model_type}) transformers "
            f"{transformers.__version__} has no class, and none for the whole to take it out of. Give another base."
        )
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(_no_language_model(config, name))
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        raise ConfigError(
            f"model.base: {name} attends in both directions (use_bidirectional_attention). Give a causal model."
        )
    text.name_or_path = config.name_or_path
    is_whole = text is not config and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    if is_whole and _tied(text) != _tied(config):
        # Where nobody said that the head is tied, published files have one of their own, and transformers ties no
        # weights that differ in the files.
        text.tie_word_embeddings = bool(given.get("tie_word_embeddings"))
    return text


def _no_language_model(config: PretrainedConfig, name: str) -> str:
    """The sentence for a type for which transformers builds no separate language model."""
    kind, kinds = config.model_type, cast(list[Any], MODEL_FOR_MULTIMODAL_LM_MAPPING.keys())
    if wholes := sorted(whole.model_type for whole in kinds if type(config) in whole.sub_configs.values()):
        return (
            f"model.base: {name} is a {kind} model, which transformers {transformers.__version__} builds as a part of"
            f" {' or '.join(wholes)} alone. Give such a model, or write its config.json around this one, as its"
            " text_config."
        )
    return f"model.base: {name} is a {kind} model, which is no causal language model. Give one."


def _tied(config: PretrainedConfig) -> bool | None:
    return getattr(config, "tie_word_embeddings", None)


def first_layers(config: PretrainedConfig, layers: int | None) -> tuple[PretrainedConfig, int]:
    """`config` cut to its first `layers`, and the number of layers that it had."""
    whole, config = config, config.get_text_config()
    count: int = config.num_hidden_layers
    if not layers or layers >= count:
        return whole, count
    for key, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == count and any(word in key for word in BY_LAYER):
            setattr(config, key, value[:layers])
    if shared := getattr(config, SHARED, None):
        setattr(config, SHARED, max(0, shared + layers - count))
    config.num_hidden_layers = layers
    return whole, count


def own_tokenizer(kind: str) -> str | None:
    """The class that transformers uses for the tokenizer of a base of this type. None if the tokenizer decides.

    transformers knows types whose tokenizers name a wrong class. Its lists of them are private."""
    if kind not in tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS:
        return None
    return tokenization_auto.TOKENIZER_MAPPING_NAMES.get(kind)
