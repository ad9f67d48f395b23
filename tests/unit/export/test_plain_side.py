"""The side of a proof that plain libraries compute: how an adapter is merged."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from trainer.export.proof.plain import merge_and_round


def test_an_adapter_is_merged_in_fp32_and_rounded_once_to_what_the_files_hold() -> None:
    torch.manual_seed(0)
    inner = nn.Linear(64, 48, bias=False).bfloat16()
    base, before = nn.ModuleDict({"inner": inner}), inner.weight.detach().clone()
    config = LoraConfig(r=16, lora_alpha=24, target_modules=["inner"], init_lora_weights=False)
    adapted: Any = get_peft_model(base, config)  # type: ignore[arg-type]  # any module does
    layer = adapted.base_model.model["inner"]
    down, up = (getattr(layer, name)["default"].weight.bfloat16().float() for name in ("lora_A", "lora_B"))
    adapted.bfloat16()
    merge_and_round(adapted, {"inner.weight": torch.bfloat16, "embedding": torch.float16}, "embedding")
    expected = (before.float() + 1.5 * up @ down).bfloat16()
    assert torch.equal(layer.base_layer.weight.bfloat16(), expected)
