"""The start of a model with adapters, and the norms that DoRA's magnitudes must have there."""

from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.dist.assembled import assemble_run
from tests.nf4 import dequantized
from trainer.config import parse_config
from trainer.tuning.method import method_of


def start(config_text: str, destination: str, first: int = 3) -> dict[str, Any]:
    """Rank 0 writes every parameter that learns, fp32. -> what the model is then, and with adapters that have learnt.

    It is asked about the tokens from `first` on.
    """
    here = assemble_run(parse_config(config_text))
    model, method = here.engine.model, method_of(here.config)
    every: list[tuple[str, Any]] = list(model.named_parameters())
    frozen = [parameter for _, parameter in every if not parameter.requires_grad and not parameter.ds_persist]
    assert frozen or here.ranks.world_size == 1  # a rank alone has all of it whole
    whole = sum(parameter.ds_status.name == "AVAILABLE" for parameter in frozen)
    values: dict[str, Tensor] = {}
    for name, parameter in every:
        if parameter.requires_grad:
            value = safe_get_full_fp32_param(parameter)
            assert value is not None
            values[name] = value.clone().contiguous()
    if here.ranks.rank == 0:
        save_file(values, destination)
    tokens = torch.arange(first, first + 22)[None]
    begun = here.engine.logits(tokens)
    with method.switched_off(model):
        base = here.engine.logits(tokens)
    here.set_masters()
    learnt = here.engine.logits(tokens)
    with method.switched_off(model):
        off = here.engine.logits(tokens)
    return {
        "whole": whole,
        "starts_as_base": torch.equal(begun, base),
        "is_base_switched_off": torch.equal(off, base),
        "learns": not torch.equal(learnt, base),
    }


def row_norms(base: Path) -> dict[str, Tensor]:
    """Path of each linear layer -> the lengths of the rows of its weight as quantized to NF4 for products in bf16."""
    norms: dict[str, Tensor] = {}
    for file in base.glob("*.safetensors"):
        for name, weight in load_file(file).items():
            if name.endswith("_proj.weight"):
                weight = dequantized(weight.bfloat16())
                length = torch.linalg.vector_norm(weight.float(), dim=1)
                norms[name.removesuffix(".weight")] = length.bfloat16().float()
    return norms
