"""What is gathered together: parameters of one module or layer, small ones in groups, large ones alone."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.model.test_documents import build
from trainer.state.zero import gather


def parameters(*sizes: int) -> list[Any]:
    """Parameters of so many bytes."""
    return [SimpleNamespace(number=n, ds_numel=size // 2, dtype=torch.bfloat16) for n, size in enumerate(sizes)]


def test_small_parameters_are_gathered_in_groups() -> None:
    quarter = gather._ALONE // 4
    given = parameters(quarter - 2, 2, quarter, 2, 2, 3 * quarter)
    assert [[one.number for one in group] for group in gather._groups(given)] == [[0, 1], [2], [3, 4, 5]]
    last = parameters(quarter, 2)
    assert list(gather._groups(last)) == [last[:1], last[1:]]
    assert list(gather._groups([])) == []
    assert [gather._is_alone(one) for one in parameters(4 * quarter - 2, 4 * quarter)] == [False, True]


def test_a_layer_is_gathered_whole_and_what_is_beside_the_layers_by_its_module() -> None:
    model = build("llama")
    names = {module: name for name, module in model.named_modules()}
    found = {names[module]: own for module, own in gather._together(model)}
    layers = [f"model.layers.{layer}" for layer in range(len(model.model.layers))]
    assert list(found) == ["model.embed_tokens", *layers, "model.norm", "lm_head"]
    assert found[layers[0]] == list(model.get_submodule(layers[0]).parameters())
    every = {id(one) for own in found.values() for one in own}
    assert every == {id(one) for one in model.parameters()}


def test_gradients_of_what_a_module_uses_are_summed_inside_of_it_first() -> None:
    learning, frozen = torch.ones(3, requires_grad=True), torch.ones(3)
    same, number, nothing, view = gather._summed_apart(nn.Identity(), (frozen, 3, None, learning))
    assert same is frozen
    assert (number, nothing) == (3, None)
    assert view is not learning
    assert view.grad_fn is not None
    assert torch.equal(view, learning)
    found = list(gather._tensors({"a": [frozen, (learning, 3)], "b": None}))
    assert all(one is other for one, other in zip(found, (frozen, learning), strict=True))


def gathers(**state: Any) -> Any:
    """The gathers of a pass with this state, of no model."""
    made: Any = gather.Gathers.__new__(gather.Gathers)
    vars(made).update(state)
    return made


def test_a_layer_is_kept_where_the_rest_of_the_pass_and_the_way_back_are_short() -> None:
    first, second, head = units = [SimpleNamespace(numel=numel) for numel in (10, 20, 30)]
    for reuse, kept in ((100, False), (101, True)):
        assert gathers(_now=[first], _before=units, _reuse=reuse)._is_soon_used_again() is kept
    assert gathers(_now=[first, second, head], _before=units, _reuse=1)._is_soon_used_again()
    assert not gathers(_now=[second], _before=units, _reuse=1000)._is_soon_used_again(), "the pass is another one"


@pytest.mark.parametrize(
    ("changed", "begins"),
    [
        ({}, True),
        ({"_live": 6}, False),
        ({"_live_bytes": 11}, False),
        ({"_prefetches": False}, False),
    ],
    ids=str,
)
def test_a_layer_is_gathered_ahead_where_there_is_room(changed: dict[str, Any], begins: bool) -> None:
    unit, fetched = gather._Unit(parameters(10)), list[Any]()
    state = {"_live": 5, "_most": 10, "_live_bytes": 10, "_room": 20, "_prefetches": True, **changed}
    gathers(**state, _fetch=fetched.append, _ahead=set[Any]())._prefetch(unit)
    assert fetched == [unit] * begins
