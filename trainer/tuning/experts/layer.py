"""Low-rank adapters of a mixture's experts (LoRA, arXiv:2106.09685): W + scaling * B @ A, with A and B for each expert.

Grouped products multiply the rows of all experts, and B @ A is never formed. As in trainer/model/held/layers.py the
function keeps the module for its backward pass, never the gathered A and B.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import pad

from trainer.model.kept import Kept, keep
from trainer.model.kernels.grouped import ALIGNMENT, Groups


class ExpertLora(nn.Module):
    """The adapter of a stack (E, rows, columns).

    lora_A (E, r, in) and lora_B (E, out, r) are as in PEFT. PEFT takes a stack's matrices as (out, in), or as (in, out)
    if their class says `is_transposed`. With `swapped` the class multiplies with matrices (in, out) without saying so:
    the roles of A and B are then exchanged, and A makes the outputs.
    """

    def __init__(self, lora_A: Tensor, lora_B: Tensor, scaling: float, *, swapped: bool) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.rank, self.scaling, self.swapped = lora_A.shape[1], scaling, swapped
        self.active = True

    def begin(self, rows: Tensor, groups: Groups) -> "Begun":
        """Multiply rows (S, in), sorted by expert, by scaling * A of their experts.

        The frozen product has to take the rows that come back: what is saved for gradients is saved before it, and the
        last product of a layer need not be computed again.
        """
        with torch.no_grad():
            low = groups.product(rows, self.factors()[0]).mul_(self.scaling)
        rows, kept = keep(rows, rows, low)
        return Begun(rows, low, kept)

    def finish(self, begun: "Begun", groups: Groups) -> Tensor:
        """Multiply by B -> (S, out). The caller adds the result to the frozen product."""
        return _LowRank.apply(begun.rows, self.lora_A, self.lora_B, begun, self, groups)  # type: ignore[return-value]

    def factors(self) -> tuple[Tensor, Tensor]:
        """The matrices of both products, (E, in, R) and (E, R, out).

        R is the rank, padded with zeros to a multiple of 16 bytes, as torch's kernel requires."""
        odd = -self.rank % (ALIGNMENT // self.lora_A.itemsize)
        a, b = pad(self.lora_A.data, (0, 0, 0, odd)), pad(self.lora_B.data, (0, odd))
        return (b, a) if self.swapped else (a.mT, b.mT)


class Begun(NamedTuple):
    """The rows (S, in), and scaling * A of them (S, R); `kept` has both for the backward pass, if rows have a
    gradient.
    """

    rows: Tensor
    low: Tensor
    kept: Kept | None


class _LowRank(Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, a: Tensor, b: Tensor, begun: Begun, adapter: ExpertLora, groups: Groups
    ) -> Tensor:
        """`rows`, `a` and `b` are arguments only so that autograd gives them gradients."""
        if begun.kept is None:
            ctx.save_for_backward(rows, begun.low)
        ctx.kept, ctx.adapter, ctx.groups = begun.kept, adapter, groups
        return groups.product(begun.low, adapter.factors()[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None, None]:  # type: ignore[override]
        adapter, groups, grad = ctx.adapter, ctx.groups, grad.contiguous()
        rows, low = ctx.saved_tensors if ctx.kept is None else ctx.kept.tensors
        first, second = adapter.factors()
        of_low = groups.product(grad, second.mT).mul_(adapter.scaling)
        of_rows = groups.product(of_low, first.mT) if ctx.needs_input_grad[0] else None
        if adapter.swapped:
            of_a, of_b = groups.outer(low, grad), groups.outer(rows, of_low)
        else:
            of_a, of_b = groups.outer(of_low, rows), groups.outer(grad, low)
        return of_rows, of_a[:, : adapter.rank].contiguous(), of_b[:, :, : adapter.rank].contiguous(), None, None, None
