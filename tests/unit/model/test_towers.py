"""An adapter that is lent to a layer of the tower computes as PEFT's, while it is lent."""

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from trainer.model.towers import AdaptedLayers, Lent

INPUTS, OUTPUTS, RANK, ALPHA = 12, 20, 4, 6


def test_a_lent_adapter_is_pefts_and_drops_inputs_where_it_trains() -> None:
    torch.manual_seed(0)
    base, x = nn.Linear(INPUTS, OUTPUTS), torch.randn(1, 5, INPUTS)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.5, target_modules=["0"], init_lora_weights=False)
    peft: Any = inject_adapter_in_model(config, nn.Sequential(nn.Linear(INPUTS, OUTPUTS)))
    peft[0].base_layer.load_state_dict(base.state_dict())
    down, up = (adapter["default"].weight.detach() for adapter in (peft[0].lora_A, peft[0].lora_B))
    whole = nn.ModuleDict({"tower": nn.Sequential(base)})
    layers = AdaptedLayers(["tower.0"], ALPHA / RANK, 0.5, whole)
    values = {"tower/0/lora_A": down, "tower/0/lora_B": up}
    for training in (False, True):
        peft.train(training)
        with layers.using(Lent(values, training)):
            torch.manual_seed(1)
            ours = whole["tower"](x)
        torch.manual_seed(1)
        torch.testing.assert_close(ours, peft(x))
        assert torch.equal(whole["tower"](x), base(x))
