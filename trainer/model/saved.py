"""Tensors that a function of autograd needs in its backward pass, saved before the function runs.

The recomputation of a layer (torch.utils.checkpoint) ends with the last tensor that was saved in the layer. A function
that saves its own inputs has been computed by then. Where a node before it saves them, the recomputation ends there.

    down_proj saves its input        recomputed: ... gate, up, down
    a node before it saves that      recomputed: ... gate, up
"""

from typing import Any

import torch
from torch import Tensor


class Saved:
    """The saved tensors, for the function that follows the node that has them."""

    node: Any

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.node.saved_tensors


def save_before(x: Tensor, *tensors: Tensor) -> tuple[Tensor, Saved | None]:
    """Save `tensors`, and return x, which the function then has to take. None if x has no gradient, because such a node
    would save nothing."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x, None
    kept = Saved()
    return _Keep.apply(x, kept, *tensors), kept  # type: ignore[return-value]


class _Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Saved, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.count = len(tensors)
        kept.node = ctx
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, *(None,) * (1 + ctx.count)
