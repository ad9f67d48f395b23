"""Builds a language model from the decoder and the head of a larger class, if the language model has no own class.

The larger class also processes pictures or sound. transformers says which module is the decoder (`get_decoder`) and
which the head. The whole class may scale and cap logits, which trainer/base/describe/logits.py finds. It must do
nothing else to text, which trainer/base/describe/trial/whole.py tries.
"""

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)


def is_part(config: PretrainedConfig) -> bool:
    """Whether `config` belongs to a whole class whose language model has no class of its own."""
    text = config.get_text_config()
    return type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING


def whole_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class with which users load a model that also processes pictures or sound.

    It is the one that `architectures` names, if that class takes such settings and predicts tokens. Otherwise it is
    transformers' own choice."""
    predicting = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values()}
    for name in config.architectures if isinstance(config.architectures, list) else ():
        named: type[PreTrainedModel] | None = getattr(transformers, name) if name in predicting else None
        if named is not None and named.config_class is type(config):
            return named
    made: type[PreTrainedModel] = MODEL_FOR_MULTIMODAL_LM_MAPPING[type(config)]  # type: ignore[assignment]  # typed as what is not loaded yet
    return made


def whole_model(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of `whole_class`, on `meta`, in the type that `config` names or in another one.

    transformers' function that builds a class in a given type is private."""
    with torch.device("meta"), meta_device_safe_creation_ops():
        return whole_class(config)._from_config(config, **({} if dtype is None else {"dtype": dtype}))


def head_of(whole: PreTrainedModel) -> nn.Module | None:
    """The output head of a model. Some models know it only through the language model inside them."""
    models = (module for module in whole.modules() if isinstance(module, PreTrainedModel))
    return next((head for model in models if (head := model.get_output_embeddings()) is not None), None)


class NoLanguagePart(Exception):
    """Raised for a whole class from which no language model can be taken. The text says why, as a clause."""


class LanguagePart(PreTrainedModel):
    """A causal language model made of a `decoder` and a `head`. Its settings are the decoder's."""

    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, decoder: PreTrainedModel, head: nn.Module, alike: type[PreTrainedModel]) -> None:
        """`alike` is the class of the whole. Its rules for loading also hold for this part."""
        vars(self)["_kind"] = type(decoder)  # before torch's own, which asks for it
        super().__init__(decoder.config)
        self.model, self.lm_head = decoder, head
        for name in ("_supports_sdpa", "_supports_flash_attn"):
            setattr(self, name, getattr(decoder, name))
        for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            setattr(self, name, getattr(decoder, name) or getattr(alike, name))
        self._keys_to_ignore_on_load_unexpected = alike._keys_to_ignore_on_load_unexpected

    @classmethod
    def of(cls, whole: PreTrainedModel) -> "LanguagePart":
        """The language part of the model `whole`. It shares the model's modules.

        Raises `NoLanguagePart` if the model has no decoder or no head.
        """
        decoder, head = whole.get_decoder(), whole.get_output_embeddings()
        if not isinstance(decoder, PreTrainedModel) or head is None:
            raise NoLanguagePart(f"class {type(whole).__name__} has no decoder with an output head")
        if decoder.get_output_embeddings() is not None:
            raise NoLanguagePart(f"class {type(whole).__name__} has a decoder with an output head of its own inside")
        return cls(decoder, head, type(whole))

    def _can_set_experts_implementation(self) -> bool:  # type: ignore[override]  # transformers looks into the file of the class
        return vars(self)["_kind"]._can_set_experts_implementation()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(self, input_ids: Any = None, **given: Any) -> CausalLMOutputWithPast:
        """(1, T) int64 -> logits (1, T, V)."""
        output = self.model(input_ids=input_ids, **given)
        past = output.get("past_key_values")
        return CausalLMOutputWithPast(logits=self.lm_head(output.last_hidden_state), past_key_values=past)  # type: ignore[call-arg]  # a dataclass behind a decorator
