"""LoRA's linear layer (arXiv:2106.09685) as one function of autograd: W x + scaling * B (A x).

PEFT's is seven: a product with the scaling and a sum go over all of the result, and over its gradient. Here the scaling is taken
where values are few, `rank` a token, and the second product is added to the first.
"""

import math
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

from trainer.model.nf4 import multiply, multiply_back
from trainer.processes.accelerator import is_accelerator


class LoraLinear(Linear):
    """PEFT's layer with another forward pass, for one adapter on a frozen layer."""

    computed_at_once = True  # see trainer/model/parts.py

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        base: Any = self.base_layer
        (name,) = self.active_adapters
        down, up = self.lora_A[name].weight, self.lora_B[name].weight
        if self.disable_adapters or self.merged or base.weight.requires_grad or x.dtype != down.dtype:
            return super().forward(x, *args, **kwargs)
        dropout = self.lora_dropout[name]
        dropped = dropout(x) if isinstance(dropout, nn.Dropout) and self.training else None
        return _AdaptedMatmul.apply(x, dropped, down, up, base.bias, base, self.scaling[name])  # type: ignore[return-value]


class _AdaptedMatmul(torch.autograd.Function):
    """Keeps what the adapter's gradients need, its inputs and A x, and never a gathered weight, as `_FrozenMatmul` does."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor | None,
        down: nn.Parameter,
        up: nn.Parameter,
        bias: Tensor | None,
        base: nn.Linear,
        scaling: float,
    ) -> Tensor:
        """x and `dropped`, which the adapter reads if it is not x, (..., inputs) -> (..., outputs)."""
        inputs = x if dropped is None else dropped
        result = multiply(x, base, bias)
        low = nn.functional.linear(inputs, down)
        ctx.save_for_backward(inputs, low)
        ctx.down, ctx.up, ctx.base, ctx.scaling, ctx.drops = down, up, base, scaling, dropped is not None
        if _folds(scaling, result):
            _add_product(result, low, up.t(), scaling)
        else:
            result += nn.functional.linear(low, up).mul_(scaling)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs, low = (saved.flatten(0, -2) for saved in ctx.saved_tensors)
        down, up, scaling = ctx.down.detach(), ctx.up.detach(), ctx.scaling
        flat = scaled = grad.flatten(0, -2)
        if _folds(scaling, grad):
            low_grad, low = (flat @ up).mul_(scaling), low * scaling
        else:
            scaled = flat * scaling
            low_grad = scaled @ up
        x_grad = multiply_back(grad, ctx.base) if ctx.needs_input_grad[0] else None
        dropped_grad = (low_grad @ down).view(*grad.shape[:-1], -1) if ctx.drops else None
        if x_grad is not None and not ctx.drops:
            _add_product(x_grad, low_grad, down)
        bias = flat.sum(0) if ctx.needs_input_grad[4] else None
        return x_grad, dropped_grad, low_grad.t() @ inputs, scaled.t() @ low, bias, None, None


def _folds(scaling: float, result: Tensor) -> bool:
    """Whether the scaling may be taken at another place: a power of two changes no bit of a rounded value. Elsewhere it may where
    sums are rounded once, which is nearer to the true value than what is rounded in between."""
    return _is_rounded_once(result) or math.frexp(scaling)[0] == 0.5


def _is_rounded_once(total: Tensor) -> bool:
    """Whether products are added within their kernel: on a GPU. On a CPU they are rounded first, and so results stay those of PEFT's
    layer and of earlier versions to the last bit."""
    return is_accelerator(total.device)


def _add_product(total: Tensor, left: Tensor, right: Tensor, factor: float = 1.0) -> None:
    """total (..., m) += factor * left (..., k) @ right (k, m); `total` and `left` are contiguous."""
    rows, total_rows = left.flatten(0, -2), total.flatten(0, -2)
    if _is_rounded_once(total):
        total_rows.addmm_(rows, right, alpha=factor)
    else:
        total_rows.add_(rows @ right, alpha=factor)
