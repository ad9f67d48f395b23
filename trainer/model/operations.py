"""Counts the operations of the tower of a base while it computes, for no family in particular.

How much it computes depends on each picture: on its size, on the tiles that it is cut into, and on what the class makes
of them. So nothing is said beforehand. Each product that the class asks PyTorch for is counted as it is called, from
the shapes of its factors, so nobody waits for a device:

    product of (n, k) and (k, m)             forward 2 n k m    backward 2 n k m for each factor with a gradient
    attention of n tokens to m, width w              4 n m w             8 n m w

Features that are kept ask for no product, and count nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

_Products = Sequence[tuple[int, bool, bool]]
"""The operations of each product, and which of its factors have a gradient."""


class Operations(TorchFunctionMode):
    """Inside, products are counted.

    `forward` are those of forward passes, and `all` has those of their backward passes, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.all = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        products_of = _PRODUCTS.get(getattr(func, "__name__", ""))
        if products_of is None:
            return func(*args, **given)
        result, products = products_of(func, args, given)
        learns = torch.is_grad_enabled()
        for operations, first, second in products:
            self.forward += operations
            self.all += operations * (1 + learns * (first + second))
        return result

    def repeated(self, forward: int) -> None:
        """Count so many operations of a forward pass again, which its backward pass repeats."""
        self.all += forward


def _plain(first: int, second: int, inner: Callable[[Any, Any], int]) -> Callable[..., tuple[Any, _Products]]:
    """A function with two factors at these places among its arguments. Each value of the result is a sum of as many
    products as `inner` says."""

    def counted(func: Any, args: Sequence[Any], given: dict[str, Any]) -> tuple[Any, _Products]:
        result = func(*args, **given)
        named = [*args, *given.values()]
        one, other = named[first], named[second]
        return result, [(2 * result.numel() * inner(one, other), one.requires_grad, other.requires_grad)]

    return counted


def _attention(func: Any, args: Sequence[Any], given: dict[str, Any]) -> tuple[Any, _Products]:
    result = func(*args, **given)
    query, key, value = [*args, *(given[name] for name in ("query", "key", "value") if name in given)][:3]
    pairs = query.numel() // query.shape[-1] * key.shape[-2]
    of_scores = query.requires_grad, key.requires_grad
    return result, [
        (2 * pairs * query.shape[-1], *of_scores),
        (2 * pairs * value.shape[-1], any(of_scores), value.requires_grad),
    ]


def _several(func: Any, args: Sequence[Any], given: dict[str, Any]) -> tuple[Any, _Products]:
    """A function that multiplies inside, out of sight."""
    with FlopCounterMode(display=False) as counter:
        result = func(*args, **given)
    learns = (result if isinstance(result, Tensor) else result[0]).requires_grad
    return result, [(counter.get_total_flops(), learns, learns)]


def _width(x: Tensor, _other: Tensor) -> int:
    return x.shape[-1]


def _of_kernel(_x: Tensor, weight: Tensor) -> int:
    return weight[0].numel()


_PRODUCTS: dict[str, Callable[..., tuple[Any, _Products]]] = {
    "linear": _plain(0, 1, _width),
    **dict.fromkeys(("matmul", "__matmul__", "mm", "bmm"), _plain(0, 1, _width)),
    **dict.fromkeys(("addmm", "baddbmm"), _plain(1, 2, _width)),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _plain(0, 1, _of_kernel)),
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("einsum", "multi_head_attention_forward"), _several),
}
