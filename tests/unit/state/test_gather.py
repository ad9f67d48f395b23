"""What is gathered together: parameters of one module or layer, small ones in groups, large ones alone."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.unit.model.test_documents import build
from trainer.state.zero import gather
from trainer.state.zero.clock import Clock


class Parameter:
    """One that equals itself alone, as a tensor does."""

    def __init__(self, **facts: Any) -> None:
        vars(self).update(facts)


def parameters(*sizes: int) -> list[Any]:
    """Parameters of so many bytes."""
    return [Parameter(number=n, ds_numel=size // 2, dtype=torch.bfloat16) for n, size in enumerate(sizes)]


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


def test_a_module_that_reads_its_parts_in_its_own_call_is_gathered_with_them() -> None:
    class Adapted(nn.Module):
        computed_at_once = True

        def __init__(self) -> None:
            super().__init__()
            self.base, self.down = nn.Linear(2, 2), nn.Linear(2, 1)

    model = nn.Sequential(Adapted(), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    names = {module: name for name, module in model.named_modules()}
    assert [(names[module], len(own)) for module, own in gather._together(model)] == [("0", 4), ("1.0", 2)]


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


WHOLE, PARTED = gather.ZeroParamStatus.AVAILABLE, gather.ZeroParamStatus.NOT_AVAILABLE


def placed(parted: list[int], *states: tuple[Any, bool]) -> list[Any]:
    """Parameters in these states, which learn or do not, and note their number in `parted` where they are divided."""
    return [
        SimpleNamespace(ds_status=status, requires_grad=learns, partition=lambda number=number: parted.append(number))
        for number, (status, learns) in enumerate(states)
    ]


def test_an_update_parts_what_learns_alone_and_a_wrong_copy_is_gathered_anew() -> None:
    parted, done = list[int](), list[str]()
    kept = placed(parted, (WHOLE, True), (WHOLE, False), (PARTED, True), (PARTED, False))
    made = gathers(_whole=kept, finish=lambda: done.append("finished"), gather_whole=lambda: done.append("gathered"))
    made._part_what_learns()
    assert (parted, done) == ([0], ["finished"])
    made.gather_again()
    assert (parted, done) == ([0, 0, 1], ["finished", "gathered"])


def test_what_is_looked_at_is_shown_once() -> None:
    shown, first, other = list[Any](), parameters(2), parameters(2)
    made = gathers(_turns=[first, other], _turn=None, _look=len)
    made.look_at(0, shown.append)
    for group in (other, first, first):
        made._looked(group)
    assert shown == [first]
    assert made.turns == 2


def test_a_pass_gathers_ahead_what_came_next_in_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = units = [gather._Unit(parameters(2)) for _ in range(3)]
    ahead, held = list[Any](), list[Any]()
    made = gathers(_before=units, _now=[], _turn=None, _prefetch=ahead.append, _hold=held.append)
    for unit in (first, third, third):
        made._before_forward(unit)
    assert held == [first, third, third]
    assert ahead == [second], "the second unit was another one, and behind the third nothing comes"
    monkeypatch.setattr(gather, "_is_recomputed", lambda: True)
    made._before_forward(first)
    assert len(held) == 3, "its backward pass holds it"


def test_the_end_of_a_pass_frees_what_its_calls_hold_and_what_was_gathered_in_vain() -> None:
    done, unit = list[Any](), gather._Unit(parameters(2))
    call = gather._Call(unit, held=True)
    made = gathers(
        _calls=[call],
        _open=[call],
        _ahead={unit},
        _let_go=lambda unit: done.append("let go"),
        _wait=lambda unit: done.append("waited for"),
        _free=lambda unit: done.append("freed"),
    )
    made.finish()
    assert done == ["let go", "waited for", "freed"]
    assert (made._calls, made._open, call.held) == ([], [], False)


def test_copies_are_made_of_small_parameters_that_were_gathered_together() -> None:
    small, large = gather._Unit(parameters(6, 8, 10)), gather._Unit(parameters(gather._ALONE, 8))
    first, second, third = small.parameters
    flying = gathers(_handles={})
    for handles, copied in (
        ({}, 0),
        ({first: 1}, 0),
        ({first: 1, third: 1}, 16),
        ({first: 1, second: 1, third: 1}, 24),
    ):
        flying._handles = handles
        assert flying._copied(small) == copied
    flying._handles = dict.fromkeys(large.parameters, 1)
    assert flying._copied(large) == 0, "one is gathered in place, and the other has no company"


def test_the_keys_of_a_policy_bound_what_is_gathered_ahead() -> None:
    def made(**policy: Any) -> tuple[Any, ...]:
        zero: Any = SimpleNamespace()
        found: Any = gather.Gathers(nn.Module(), zero, policy, Clock(torch.device("cpu")))
        assert zero.persistent_parameters == []
        return found._prefetches, found._most, found._reuse

    assert made() == (True, math.inf, 0)
    assert made(stage3_prefetch_bucket_size=0) == (False, math.inf, 0)
    assert made(stage3_max_live_parameters=7, stage3_max_reuse_distance=9) == (True, 7, 9)


def test_deepspeeds_hooks_are_left_out_of_our_engine_alone() -> None:
    plain = gather.DeepSpeedZeRoOffload.setup_zero_stage3_hooks
    with pytest.raises(ValueError, match="no engine"), gather.without_hooks():  # noqa: PT012 # the hooks within
        assert gather.DeepSpeedZeRoOffload.setup_zero_stage3_hooks is not plain
        raise ValueError("no engine")
    assert gather.DeepSpeedZeRoOffload.setup_zero_stage3_hooks is plain
