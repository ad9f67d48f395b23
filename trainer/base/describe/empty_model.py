"""Builds transformers' model without weights: tensors that files hold are on `meta`, all others are computed.

As in transformers' own `from_pretrained`, a family's `_init_weights` computes the buffers that are not stored, such as
rotary frequencies, and some weights and buffers stay in fp32 in a model of another type.

If the language model has no class of its own, it is built from the decoder and the head of a larger class, which also
processes pictures or sound. transformers says which module is the decoder (`get_decoder`) and which the head. The whole
class may scale and cap logits, which trainer/base/describe/logits.py finds. It must do nothing else to text, which
trainer/base/describe/trial/self_test.py tries.
"""

import copy
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import meta_device_safe_creation_ops
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

_USUAL_KERNELS = (None, "eager", "sdpa")


def meta_model(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """The causal language model of `config`, with all parameters and buffers on `meta`.

    `options` are those of `from_config`. If transformers has no class for the language model of a `config`, it is a
    part of the whole class. accelerate's `init_empty_weights` is not used: it would first make each tensor, and fill
    the experts of some families.
    """
    part = is_part(config)
    made_by = AutoModelForMultimodalLM if part else AutoModelForCausalLM
    with torch.device("meta"), meta_device_safe_creation_ops():
        model = made_by.from_config(with_usual_kernels(config), trust_remote_code=False, **options)
        return LanguagePart.of(model) if part else with_linear_layers(_without_idle_rows(model))


class TransposedLinear(nn.Linear):
    """A linear layer that replaces transformers' `Conv1D`. The files hold the transpose of its weight."""


def with_linear_layers(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with linear layers in place of the layers with transposed weights of GPT-2 and similar families."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            layer = TransposedLinear(module.nx, module.nf, device="meta")
            layer.weight, layer.bias = nn.Parameter(module.weight.data.t().contiguous()), module.bias
            model.set_submodule(path, layer)
    return model


def _without_idle_rows(model: PreTrainedModel) -> PreTrainedModel:
    """`model` without rows in a stack for experts that have no weights.

    transformers 5.24 makes such rows for LongCat's 256 experts without weights in the first of the two stacks, and
    saves them. No published file has them, and no code reads them."""
    for module in model.modules():
        up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
        if isinstance(up, nn.Parameter) and isinstance(down, nn.Parameter) and len(up) > len(down):
            module.idle_rows = len(up) - len(down)  # type: ignore[assignment]  # for `idle_rows`
            module.gate_up_proj = nn.Parameter(up[: len(down)])
    return model


def idle_rows(model: PreTrainedModel, name: str) -> int:
    """The number of further rows of the parameter `name` that files may have, which no code reads."""
    path, _, leaf = name.rpartition(".")
    return vars(model.get_submodule(path)).get("idle_rows", 0) if leaf == "gate_up_proj" else 0


def unfilled_model(config: PretrainedConfig, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """As `meta_model`, but the buffers that no file holds are computed.

    Its parameters and persistent buffers are on `meta`, each in the type in which `from_pretrained` would load it.
    """
    return _with_buffers(meta_model(config, dtype=dtype, **options), dtype)


def unfilled_whole(config: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The same for the whole class of a base that sees. `attention` is the kernel of the decoder: if it is `eager`, all
    parts have it; otherwise each part that supports SDPA has that."""
    kernel, config = "eager" if attention == "eager" else None, with_usual_kernels(config)
    with torch.device("meta"), meta_device_safe_creation_ops():
        model = whole_class(config)._from_config(config, dtype=dtype, attn_implementation=kernel)
    return _with_buffers(model, dtype)


def with_usual_kernels(config: PretrainedConfig) -> PretrainedConfig:
    """`config`, without a kernel of attention that its file names and that comes from a package, which this machine may
    lack. transformers then takes SDPA for each part that supports it."""
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    if all(getattr(part, "_attn_implementation", None) in _USUAL_KERNELS for part in parts):
        return config
    config = copy.deepcopy(config)
    config._attn_implementation = None
    return config


def _with_buffers(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    stored = model.state_dict(keep_vars=True)
    # This private method says which weights a family keeps in fp32, mostly routers.
    in_fp32 = list(model._get_dtype_plan(dtype))
    if in_fp32:
        pattern, *_ = build_glob_alternation(in_fp32)
        for name, tensor in stored.items():
            if pattern.search(name):
                tensor.data = tensor.data.float()
    for tensor in stored.values():
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # so that the next call leaves it alone
    for name, buffer in list(model.named_non_persistent_buffers()):
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        module.register_buffer(leaf, torch.empty_like(buffer, device="cpu"), persistent=False)
    model.initialize_weights()
    return model


def is_part(config: PretrainedConfig) -> bool:
    """Whether `config` belongs to a whole class whose language model has no class of its own."""
    text = config.get_text_config()
    return type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING


def whole_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class with which users load a model that also processes pictures or sound.

    It is the one that `architectures` names, if that class takes such settings and predicts tokens. Otherwise it is
    transformers' own choice."""
    predicting = {
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(),
        *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values(),
        *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values(),
    }
    for name in config.architectures if isinstance(config.architectures, list) else ():
        named: type[PreTrainedModel] | None = getattr(transformers, name) if name in predicting else None
        if named is not None and named.config_class is type(config):
            return named
    made: type[PreTrainedModel] = whole_mapping(config)[type(config)]  # type: ignore[assignment]  # typed as what is not loaded yet
    return made


def has_whole_class(config: PretrainedConfig) -> bool:
    """Whether transformers lists a class for such a model that predicts tokens and processes more than text."""
    return type(config) in whole_mapping(config)


def whole_mapping(config: PretrainedConfig) -> Any:
    """transformers' list of the classes of such models. Some that hear, as Audio Flamingo 3, are in another one."""
    listed = type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING and not config.is_encoder_decoder
    is_elsewhere = listed and type(config) not in MODEL_FOR_MULTIMODAL_LM_MAPPING
    return MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if is_elsewhere else MODEL_FOR_MULTIMODAL_LM_MAPPING


def whole_model(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of `whole_class`, on `meta`, in the type that `config` names or in another one.

    transformers' function that builds a class in a given type is private."""
    with torch.device("meta"), meta_device_safe_creation_ops():
        return whole_class(config)._from_config(config, **({} if dtype is None else {"dtype": dtype}))


def output_head(whole: PreTrainedModel) -> nn.Module | None:
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
