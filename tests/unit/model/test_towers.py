"""A tower computes with what is lent to it, while it is lent, and an adapter computes there as PEFT's."""

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from trainer.model.towers import AdaptedLayers, ChangedWeights, Lender, Lent, parameter_name

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
    layer: Any = whole.get_submodule("tower.0")
    assert layer.weight is base.weight, "towers look at its type"
    assert layer.bias is base.bias


def test_a_change_is_added_to_a_weight_in_its_type_while_it_is_lent() -> None:
    whole: Any = nn.ModuleDict({"merger": nn.Sequential(nn.Linear(INPUTS, OUTPUTS, dtype=torch.bfloat16))})
    layer = whole["merger"][0]
    before = layer.weight
    change = torch.randn(OUTPUTS, INPUTS, requires_grad=True)
    changed = ChangedWeights({"merger": ["0.weight"]}, whole)
    with changed.using(Lent({"merger/0/weight": change}, True)):
        assert layer.weight.dtype == torch.bfloat16
        assert torch.equal(layer.weight, before + change.bfloat16())
        layer(torch.ones(1, INPUTS, dtype=torch.bfloat16)).sum().backward()
    assert change.grad is not None
    assert torch.equal(change.grad, torch.ones(OUTPUTS, INPUTS))
    assert layer.weight is before


def test_all_that_is_lent_gets_a_gradient_also_where_nothing_is_seen() -> None:
    """So all ranks reduce the same gradients. ZeRO-3 frees the parameters themselves behind the call."""
    names = [parameter_name("tower.0", kind) for kind in ("lora_A", "lora_B")]
    assert names == ["seeing.tower/0/lora_A", "seeing.tower/0/lora_B"]
    lender = Lender(
        {name: torch.full((2, 3), 4.0) for name in names}, lambda _: AdaptedLayers([], 1.0, 0.0, nn.Module())
    )
    lent = lender.eval().lent()
    assert lent is not None
    assert not lent.training
    assert list(lent.values) == ["tower/0/lora_A", "tower/0/lora_B"]
    for parameter in lender.parameters():
        parameter.data.zero_()
    assert all(bool((value == 4).all()) for value in lent.values.values())
    states = torch.randn(1, 5, 6)
    joined = lent.joined(states)
    assert torch.equal(joined, states)
    joined.sum().backward()
    for parameter in lender.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, torch.zeros(2, 3))
    training = lender.train().lent()
    assert training is not None
    assert training.training
    lender.active = False
    assert lender.lent() is None
