"""Low-rank adapters of a mixture's experts (LoRA, arXiv:2106.09685): W + scaling * B @ A, with A and B for each expert.

Grouped products multiply the rows of all experts, and B @ A is never formed. As in trainer/model/held/layers.py the
function keeps the module for its backward pass, never the gathered A and B.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.functional import pad

from trainer.model.activations import Saved, save_before
from trainer.model.experts import grouped_product
from trainer.model.kernels.grouped import ALIGNMENT, Groups
from trainer.tuning.experts import StackUpdate
from trainer.tuning.method import Moved


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
        self.moves: str | None = None
        self.of_transposed = False

    def compute_through(self, name: str, *, transposed: bool) -> None:
        """Multiply by the codes that an export as stored writes for the stack `name` (trainer/tuning/lora/layer.py).

        With `transposed` the base's parameter has matrices (in, out).
        """
        self.moves, self.of_transposed = name, transposed

    def begin(self, rows: Tensor, groups: Groups) -> "LowRows":
        """Multiply rows (S, in), sorted by expert, by scaling * A of their experts.

        The frozen product has to take the rows that come back: what is saved for gradients is saved before it, and the
        last product of a layer need not be computed again.
        """
        with torch.no_grad():
            low = groups.product(rows, self.factors()[0]).mul_(self.scaling)
        rows, kept = save_before(rows, rows, low)
        return LowRows(rows, low, kept)

    def finish(self, begun: "LowRows", groups: Groups) -> Tensor:
        """Multiply by B -> (S, out). The caller adds the result to the frozen product."""
        return _LowRank.apply(begun.rows, self.lora_A, self.lora_B, begun, self, groups)  # type: ignore[return-value]

    def through(self, rows: Tensor, groups: Groups, stack: Any, transposed: bool) -> Tensor:
        """Multiply rows (S, in) by the moved codes of the `stack` -> (S, out). `transposed` is as in
        `grouped_product`.
        """
        return _Through.apply(rows, self.lora_A, self.lora_B, self, groups, stack, transposed)

    def moved(self) -> Moved:
        """The change that it adds to the stack."""
        assert self.moves is not None
        a, b = self.lora_A.data.float(), self.lora_B.data.float()
        up, down = (a.mT, b.mT) if self.of_transposed else (b, a)
        return Moved(self.moves, StackUpdate(up, down, self.scaling))

    def factors(self) -> tuple[Tensor, Tensor]:
        """The matrices of both products, (E, in, R) and (E, R, out).

        R is the rank, padded with zeros to a multiple of 16 bytes, as torch's kernel requires."""
        odd = -self.rank % (ALIGNMENT // self.lora_A.itemsize)
        a, b = pad(self.lora_A.data, (0, 0, 0, odd)), pad(self.lora_B.data, (0, odd))
        return (b, a) if self.swapped else (a.mT, b.mT)


class LowRows(NamedTuple):
    """The rows (S, in), and scaling * A of them (S, R); `kept` has both for the backward pass, if rows have a
    gradient.
    """

    rows: Tensor
    low: Tensor
    kept: Saved | None


class _LowRank(Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, a: Tensor, b: Tensor, begun: LowRows, adapter: ExpertLora, groups: Groups
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
        of_low, of_a, of_b = _of_factors(adapter, groups, rows, low, grad)
        of_rows = groups.product(of_low, adapter.factors()[0].mT) if ctx.needs_input_grad[0] else None
        return of_rows, of_a, of_b, None, None, None


def _of_factors(
    adapter: ExpertLora, groups: Groups, rows: Tensor, low: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of what lies between both products, of A and of B."""
    of_low = groups.product(grad, adapter.factors()[1].mT).mul_(adapter.scaling)
    if adapter.swapped:
        of_a, of_b = groups.outer(low, grad), groups.outer(rows, of_low)
    else:
        of_a, of_b = groups.outer(of_low, rows), groups.outer(grad, low)
    return of_low, of_a[:, : adapter.rank].contiguous(), of_b[:, :, : adapter.rank].contiguous()


class _Through(Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        a: Tensor,
        b: Tensor,
        adapter: ExpertLora,
        groups: Groups,
        stack: Any,
        transposed: bool,
    ) -> Tensor:
        ctx.save_for_backward(rows, groups.product(rows, adapter.factors()[0]).mul_(adapter.scaling))
        ctx.adapter, ctx.groups, ctx.stack, ctx.transposed = adapter, groups, stack, transposed
        return grouped_product(rows, stack, groups, transposed, adapter.moved())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        adapter, groups, grad = ctx.adapter, ctx.groups, grad.contiguous()
        rows, low = ctx.saved_tensors
        of_rows = None
        if ctx.needs_input_grad[0]:
            of_rows = grouped_product(grad, ctx.stack, groups, not ctx.transposed, adapter.moved())
        _, of_a, of_b = _of_factors(adapter, groups, rows, low, grad)
        return of_rows, of_a, of_b, None, None, None, None
