"""The side of a proof that plain libraries compute: where a row's logits are, and how an adapter is merged."""

from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from trainer.export.proof.plain import merge_and_round, place_logits
from trainer.export.proof.rows import ProbeRow


def test_logits_are_counted_from_the_end_because_virtual_tokens_come_before_those_of_the_row() -> None:
    class Base(nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
            virtual = torch.full((1, 2), -1)
            return SimpleNamespace(logits=torch.cat([virtual, input_ids], 1)[..., None])

    row = ProbeRow(torch.tensor([[5, 6, 7, 8]]), torch.tensor([0, 2]), torch.tensor([6, 8]))
    (found,) = place_logits(Base(), [row])
    assert found.flatten().tolist() == [5, 7]


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
