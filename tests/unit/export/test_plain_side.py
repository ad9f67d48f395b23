"""The side of a proof that plain libraries compute: how an adapter is merged."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from trainer.export.proof import plain
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


class Seeing(nn.Module):
    """A class whose tower says in which type it is when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.decoder = nn.Linear(3, 2).bfloat16(), nn.Linear(2, 2).bfloat16()

    def forward(self, input_ids: Any = None, use_cache: Any = None, pixels: Any = None) -> torch.dtype:
        assert self.decoder.weight.dtype == torch.bfloat16
        return self.tower.weight.dtype


def test_a_tower_is_in_fp32_from_the_first_picture_on_and_as_it_was_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "beside_decoder", lambda whole: whole.tower.state_dict(keep_vars=True))
    whole = Seeing()
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    with plain._seeing_in_fp32(whole):
        assert whole(input_ids=1, use_cache=False) == torch.bfloat16
        assert whole(input_ids=1, pixels=2) == whole(input_ids=1) == torch.float32
        assert torch.equal(whole.tower.weight, before["tower.weight"].float())
    assert whole(input_ids=1, pixels=2) == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())
