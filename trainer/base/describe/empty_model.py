"""Builds transformers' model without weights: tensors that files hold are on `meta`, all others are computed.

As in transformers' own `from_pretrained`, a family's `_init_weights` computes the buffers that are not stored, such as
rotary frequencies, and some weights and buffers stay in fp32 in a model of another type.
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.initialization import meta_device_safe_creation_ops
from transformers.pytorch_utils import Conv1D

from trainer.base.describe.language_part import LanguagePart, is_part


def meta_model(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """The causal language model of `config`, with all parameters and buffers on `meta`.

    `options` are those of `from_config`. If transformers has no class for the language model of a `config`, it is a
    part of the whole class. accelerate's `init_empty_weights` is not used: it would first make each tensor, and fill
    the experts of some families.
    """
    part = is_part(config)
    made_by = AutoModelForMultimodalLM if part else AutoModelForCausalLM
    with torch.device("meta"), meta_device_safe_creation_ops():
        model = made_by.from_config(config, trust_remote_code=False, **options)
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
    model = meta_model(config, dtype=dtype, **options)
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
