"""The operations of a tower are those that its products take, and the bytes that it keeps those that it saves."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from trainer.model.kept import KeptBytes, kept_of
from trainer.model.operations import Operations


def of(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def attend(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    return functional.multi_head_attention_forward(
        x, x, x, 8, 2, weight, None, None, None, False, 0.0, out, None, need_weights=False
    )[0]


PRODUCTS: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "linear": (functional.linear, [of(2, 5, 8), of(6, 8)]),
    "matmul": (torch.matmul, [of(2, 5, 8), of(2, 8, 3)]),
    "@": (lambda one, other: one @ other, [of(5, 8), of(8, 3)]),
    "mm": (torch.mm, [of(5, 8), of(8, 3)]),
    "bmm": (torch.bmm, [of(2, 5, 8), of(2, 8, 3)]),
    "addmm": (torch.addmm, [of(5, 3), of(5, 8), of(8, 3)]),
    "baddbmm": (torch.baddbmm, [of(2, 5, 3), of(2, 5, 8), of(2, 8, 3)]),
    "conv1d": (functional.conv1d, [of(2, 4, 9), of(6, 4, 3)]),
    "conv2d": (lambda x, kernel: functional.conv2d(x, kernel, stride=2), [of(1, 3, 8, 8), of(6, 3, 2, 2)]),
    "conv3d": (functional.conv3d, [of(1, 3, 4, 6, 6), of(5, 3, 2, 2, 2)]),
    "einsum": (lambda one, other: torch.einsum("bik,bkj->bij", one, other), [of(2, 5, 8), of(2, 8, 3)]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_takes_what_pytorch_counts_forward_and_backward(name: str) -> None:
    function, given = PRODUCTS[name]
    with FlopCounterMode(display=False) as forward:
        function(*given)
    with FlopCounterMode(display=False) as both:
        function(*given).sum().backward()
    with Operations() as ours:
        function(*given)
    assert ours.forward == forward.get_total_flops() > 0
    assert ours.all == both.get_total_flops()
    with torch.no_grad(), Operations() as unlearnt:
        function(*given)
    assert unlearnt.all == unlearnt.forward == ours.forward


def test_a_frozen_factor_has_no_backward_product() -> None:
    with Operations() as ours:
        functional.linear(of(2, 5, 8), of(6, 8).detach())
        functional.linear(of(2, 5, 8).detach(), weight=of(6, 8).detach())
    assert ours.forward == 2 * 2 * (2 * 5 * 8 * 6)
    assert ours.all == ours.forward + 2 * (2 * 5 * 8 * 6)
    ours.repeated(7)
    assert (ours.forward, ours.all) == (2 * 2 * 480, 3 * 2 * 480 + 7)


def test_attention_takes_scores_of_all_pairs_and_a_sum_of_values() -> None:
    """4 n m w forward and 8 n m w backward where keys and values are as wide."""
    query, key, value = of(1, 2, 5, 8), of(1, 2, 7, 8), of(1, 2, 7, 4)
    pairs = 2 * 5 * 7
    with Operations() as ours:
        functional.scaled_dot_product_attention(query, key, value)
    assert ours.forward == 2 * pairs * (8 + 4)
    assert ours.all == 3 * ours.forward
    with Operations() as named:
        functional.scaled_dot_product_attention(query, key=key.detach(), value=value.detach())
    assert named.all == ours.forward + 2 * pairs * (8 + 4)
    with Operations() as of_keys:
        functional.scaled_dot_product_attention(query.detach(), key, value.detach())
    assert of_keys.all == named.all


def test_a_function_that_multiplies_inside_is_counted_too() -> None:
    given = of(5, 1, 8), of(24, 8), of(8, 8)
    with Operations() as ours:
        attend(*given)
    assert ours.forward >= 2 * 5 * 8 * (24 + 8), "its projections"
    assert ours.all == 3 * ours.forward


def test_memory_that_several_tensors_share_is_kept_once_and_weights_are_not() -> None:
    weight, first, second = torch.ones(10), torch.ones(20), torch.ones(50)
    kept = KeptBytes(iter([weight]))
    kept.begin_layer()
    for value in (weight, weight[2:], first, first.view(4, 5), first[3:]):
        assert kept.save(value) is value
    kept.end_layer()
    assert (kept.bytes, kept.layer, kept.largest) == (80, 80, 80)
    kept.save(second[:10])  # the whole memory stays
    kept.begin_layer()
    kept.save(torch.ones(1))
    kept.end_layer()
    assert (kept.bytes, kept.layer, kept.largest) == (284, 80, 200)


def test_what_a_class_keeps_is_measured_inside_alone_and_without_its_weights_and_buffers() -> None:
    inner = nn.Linear(4, 4)
    whole = nn.Sequential(nn.Linear(4, 4), inner)
    whole.register_buffer("scale", torch.ones(4, requires_grad=True))
    front: Any = SimpleNamespace(whole=whole, layers=[inner])
    x = of(3, 4)
    with kept_of(front) as kept:
        (whole(x) * whole.scale).sum()
    # The inputs of both layers, and their result as the scale's factor.
    assert (kept.bytes, kept.layer, kept.largest) == (3 * 48, 48, 48)
    whole(of(9, 4))
    assert kept.bytes == 3 * 48
    assert not inner._forward_pre_hooks
    assert not inner._forward_hooks


def test_what_is_kept_is_held_until_it_is_counted() -> None:
    """Other memory at the same place would not be counted."""
    kept = KeptBytes(iter([]))
    for size in (5, 5, 5):
        value: Any = torch.ones(size)
        kept.save(value)
        del value
    assert kept.bytes == 60
