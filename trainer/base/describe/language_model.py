"""transformers' settings of a base's language model, cut to its first layers, and its place in a larger model.

If the base also processes pictures or sound, the language model's settings are a part of its own, and the rest of its
files is left out.

PEFT renames an adapter's weights with transformers' tables of the names in a base's files. For a few families it takes
the current name of a layer for an old name in files, and puts the weights nowhere. `saved_paths` tries PEFT's own
renaming. Such weights are saved under the name that the base's files have for the layer, which PEFT renames to the
right one. If there is no such name, the layer cannot have an adapter.
"""

import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.models.auto import tokenization_auto
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)
from transformers.utils.generic import ModelOutput

from trainer.base.describe.empty_model import (
    has_whole_class,
    is_part,
    meta_model,
    output_head,
    whole_class,
    whole_model,
)
from trainer.base.describe.trial.small import BY_LAYER
from trainer.errors import ConfigError, shown
from trainer.model.parts import body

SHARED = "num_kv_shared_layers"  # the number of last layers that share keys


def model_config(directory: Path, layers: int | None) -> PretrainedConfig:
    """transformers' configuration of the language model of a base, cut to its first `layers`.

    It is that of the whole model if the language model has no class of its own."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    given = json.loads((directory / "config.json").read_bytes())
    return first_layers(causal_settings(config, str(directory), given), layers)[0]


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


def causal_settings(config: PretrainedConfig, name: str, given: Mapping[str, Any]) -> PretrainedConfig:
    """The settings of the language model within those of a base, which may also process pictures or sound.

    `given` is the base's config.json. It tells a setting from a default of its type.
    """
    kind = config.model_type
    if config.is_encoder_decoder:
        raise ConfigError(
            f"model.base: {name} is a {kind} model, an encoder with a decoder. Give a causal language model."
        )
    if inner := _predicting_part(config):
        part = whole_class(inner).__name__
        raise ConfigError(
            f"model.base: {name} is a {kind} model. Only one part of it, {part}, predicts text. Save this part in a"
            f" folder of its own with {part}.from_pretrained(...).save_pretrained(folder). Save the base's processor in"
            " the same folder, and set model.base to that folder."
        )
    text = config.get_text_config()
    if is_part(config):
        return config
    is_known = has_whole_class(config) or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    if text is not config and not is_known:
        raise ConfigError(
            f"model.base: {name} is a {kind} model, for which transformers {transformers.__version__} has no class that"
            " predicts tokens. Give another base."
        )
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(_no_language_model(config, name))
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):
        if not may_read_prompts(config):
            raise both_directions(name)
        text.use_bidirectional_attention = False  # the class hands its decoder the masks that say which tokens do
    text.name_or_path = config.name_or_path
    is_whole = text is not config and has_whole_class(config)
    if is_whole and _tied(text) != _tied(config):
        # Where nobody said that the head is tied, published files have one of their own, and transformers ties no
        # weights that differ in the files.
        text.tie_word_embeddings = bool(given.get("tie_word_embeddings"))
    return text


def _predicting_part(config: PretrainedConfig) -> PretrainedConfig | None:
    """The settings of the part of a model that predicts text, if that part is a whole model of its own: of a model that
    speaks, it is the one that thinks."""
    parts = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    return next((one for one in parts if has_whole_class(one) and one.get_text_config() is not one), None)


def both_directions(name: str) -> ConfigError:
    return ConfigError(
        f"model.base: {name} attends in both directions (use_bidirectional_attention). Give a causal model."
    )


def may_read_prompts(config: PretrainedConfig) -> bool:
    """Whether by its settings a base may read in both directions what stands before an answer, and nothing else."""
    text = config.get_text_config()
    if text is config or getattr(text, "use_bidirectional_attention", None) is not True:
        return False  # it may then have no class to ask
    return "token_type_ids" in inspect.signature(whole_class(config).forward).parameters


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


def composite_model(directory: Path) -> PreTrainedModel | None:
    """The whole model of the config.json in `directory`, on `meta`. None if it is only a language model."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    return None if config.get_text_config() is config else whole_model(config)


def composite_class(directory: Path) -> str | None:
    """transformers' class for the whole model of the config.json in `directory`. None for a language model alone."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    return None if config.get_text_config() is config else whole_class(config).__name__


def language_names(whole: PreTrainedModel, language: PreTrainedModel) -> Callable[[str], str | None]:
    """A function that maps the name of a weight in `whole` to its name in the `language` model.

    transformers builds the `language` model from a part of the settings of `whole`. A weight that is not in that part
    maps to None."""
    pairs = _places(whole, language)

    def name_in_language(name: str) -> str | None:
        for there, here in pairs:
            if name.startswith(f"{there}."):
                return f"{here}.{name.removeprefix(f'{there}.')}".removeprefix(".")
        return None

    return name_in_language


def whole_names(whole: PreTrainedModel, language: PreTrainedModel) -> Callable[[str], str]:
    """A function that maps the name of a module or weight in the `language` model to its name in `whole`.

    It is the opposite of `language_names`.
    """
    pairs = _places(whole, language)

    def name_in_whole(name: str) -> str:
        for there, here in pairs:
            if not here:
                return f"{there}.{name}"
            if f"{name}.".startswith(f"{here}."):
                return f"{there}{name.removeprefix(here)}"
        raise AssertionError(f"{name} is of no part that both models have")

    return name_in_whole


def adapter_paths(directory: str, layers: int | None, paths: Sequence[str]) -> dict[str, list[str]]:
    """Layer of the language model -> the paths under which PEFT's folder of an adapter may have it.

    One is its path in the class that users load; the other is the path that PEFT renames to that. `directory` has the
    base's config.json."""
    whole, language = composite_model(Path(directory)), meta_model(model_config(Path(directory), layers))
    in_whole = {path: path if whole is None else whole_names(whole, language)(path) for path in paths}
    saved = saved_paths(whole or language, list(in_whole.values()))
    return {path: [there, saved[there] or there] for path, there in in_whole.items()}


def _places(whole: PreTrainedModel, language: PreTrainedModel) -> list[tuple[str, str]]:
    """The paths in `whole` and in `language` of the parts that both have: the head, and the decoder.

    The head comes first, because it may lie inside the decoder.
    """
    head = _path(whole, output_head(whole)), _path(language, output_head(language))
    return [head, (_path(whole, whole.get_decoder()), place_of_decoder(whole, language))]


def inner_of(whole: PreTrainedModel) -> nn.Module:
    """The module of a whole model that makes hidden states: its decoder, or the decoder's body if that has the head."""
    decoder: Any = whole.get_decoder()
    return decoder if decoder.get_output_embeddings() is None else body(decoder)


def beside_decoder(whole: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters and stored buffers of a whole model that neither its decoder nor head nor embedding has."""
    others = [inner_of(whole), output_head(whole), whole.get_input_embeddings()]
    elsewhere = {
        id(tensor) for module in others if module is not None for tensor in module.state_dict(keep_vars=True).values()
    }
    every = whole.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in every.items() if id(tensor) not in elsewhere}


def place_of_decoder(whole: PreTrainedModel, language: PreTrainedModel) -> str:
    """The path in the `language` model of the decoder of `whole`. Empty if the decoder is the whole language model."""
    decoder = whole.get_decoder()
    return next(path for path, module in language.named_modules() if type(module) is type(decoder))


@contextmanager
def outputs_lack_nothing() -> Iterator[None]:
    """A context in which an output of transformers returns None for a field that it lacks.

    In 5.24 the whole class of Llama 4 asks its language model's output for pictures, and fails without this."""
    ModelOutput.__getattr__ = _no_such_field  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del ModelOutput.__getattr__  # type: ignore[attr-defined]


def _no_such_field(output: ModelOutput, name: str) -> None:
    # transformers itself asks whether an output has hidden states of its tower, and takes them for the last layer's.
    if name.startswith("_") or name == "vision_hidden_states":
        raise AttributeError(name)


def with_parts_of(whole: PreTrainedModel, language: PreTrainedModel) -> PreTrainedModel:
    """`whole` with its decoder and head replaced by those of the `language` model."""
    (head, other_head), (decoder, other) = _places(whole, language)
    for there, here in ((decoder, other), (head, other_head)):
        whole.set_submodule(there, language.get_submodule(here))
    return whole


def _path(model: nn.Module, part: nn.Module | None) -> str:
    return next(path for path, module in model.named_modules() if module is part)


_WRAPPED = "base_model.model."
"""Begins the names of all weights in PEFT's files."""


def saved_paths(model: PreTrainedModel, paths: Collection[str]) -> dict[str, str | None]:
    """The path of each of these layers -> the path under which its weights are saved. None if PEFT finds no path."""
    misplaced = _misplaced(model, {path: path for path in paths})
    renamed = {path: _in_files(model, path) for path in misplaced}
    return {path: path for path in paths} | renamed | dict.fromkeys(_misplaced(model, renamed))


def _misplaced(model: PreTrainedModel, saved: Mapping[str, str]) -> set[str]:
    """The layers whose weights PEFT does not load correctly if they are `saved` under these paths."""
    if (
        get_checkpoint_conversion_mapping(model.config.model_type) is None
    ):  # PEFT renames nothing, so save the seconds of its import
        return set()
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    given = {_weight(there): torch.empty(1, 1, device="meta") for there in saved.values()}
    try:
        read = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), given)
    except Exception:  # a family's table may raise any error; an export tries again with the whole adapter
        return set()
    return {path for path in saved if _weight(path) not in read}


def _weight(path: str) -> str:
    return f"{_WRAPPED}{path}.lora_A.weight"


def _in_files(model: PreTrainedModel, path: str) -> str:
    """The path of the layer at `path` in a base's files, according to transformers' table."""
    for entry in get_model_conversion_mapping(model):
        if type(entry) is WeightRenaming:
            before, pattern = entry.reverse_transform().rename_source_key(f"{path}.weight")
            if pattern is not None:
                return before.removesuffix(".weight")
    return path
