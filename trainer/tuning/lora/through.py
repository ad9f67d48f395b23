"""LoRA's linear layer through the quantizer: x times the codes that an export as stored writes (`tuning.through`).

The forward pass multiplies by Q(W + scaling * B A), where Q moves the codes of W by trainer/model/held/dither.py and
scales stay those of the base. Q is a staircase, so its own gradient is 0 nearly everywhere. The backward pass takes it
as the identity (straight through): A and B get the gradients of the unquantized x (W + scaling * B A)^T, which are
products of low rank, and x gets that of the codes. Neither pass keeps a weight; the backward pass makes the codes anew.
"""

from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.held.layers import multiply_moved, multiply_moved_back
from trainer.tuning.lora.layer import Adapted
from trainer.tuning.lora.method import LowRankUpdate
from trainer.tuning.shared.moved import Moved


def multiply_through(x: Tensor, layer: Adapted, name: str) -> Tensor:
    """x (..., inputs) -> (..., outputs), by the weight `name` of a layer. All parameters must be gathered."""
    return _Through.apply(x, layer, name, layer.down, layer.up, layer.base.bias)  # type: ignore[return-value]


def _moved(layer: Adapted, name: str) -> Moved:
    up, down = layer.up.detach().float(), layer.down.detach().float()
    return Moved(name, LowRankUpdate(up, down, layer.scaling))


class _Through(torch.autograd.Function):
    """Keeps the layer, x and A x. ZeRO-3 gathers the layer's parameters again before its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Adapted, name: str, *_parameters: Tensor | None) -> Tensor:
        """As `multiply_through`. Autograd needs the layer's parameters as arguments."""
        ctx.save_for_backward(x, nn.functional.linear(x, layer.down.detach()))
        ctx.layer, ctx.name = layer, name
        return multiply_moved(x, layer.base, layer.base.bias, _moved(layer, name))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        layer: Adapted = ctx.layer
        x, low = (saved.flatten(0, -2) for saved in ctx.saved_tensors)
        of_x = multiply_moved_back(grad, layer.base, _moved(layer, ctx.name)) if ctx.needs_input_grad[0] else None
        scaled = grad.flatten(0, -2) * layer.scaling
        of_down = (scaled @ layer.up.detach()).t() @ x
        of_up = scaled.t() @ low
        of_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[5] else None
        return of_x, None, None, of_down, of_up, of_bias
