"""Products of rows with the matrices of their groups: each token's row goes to a few experts, each expert has a matrix.

Rows are sorted by expert once, without a host synchronisation and without atomic additions, so the same bits come out
every time. A group's rows then lie together, and one kernel multiplies all groups: `torch.nn.functional.grouped_mm`, or
on GPUs where PyTorch loops over groups that of trainer/model/kernels/multiply.py.
"""

from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from trainer.model.kernels import fp8
from trainer.model.kernels.launch import can_launch, lacks_grouped_products

ALIGNMENT = 16  # bytes: strides and addresses must be multiples of this for torch's kernel


class Groups:
    """Sorts rows by the expert that each goes to. `experts` is (T, k) int64; row t * k + i is the i-th of token t.

    offsets: (count,) int32, expert e has the sorted rows [offsets[e - 1], offsets[e])
    order: (T * k,), the row that is at each place of the sorted ones; inverse: the place of each row
    experts: (T * k,), the expert of each sorted row
    """

    def __init__(self, experts: Tensor, count: int) -> None:
        self.each = experts.shape[-1]
        self.experts, self.order = torch.sort(experts.reshape(-1), stable=True)
        self.inverse = torch.empty_like(self.order)
        self.inverse[self.order] = torch.arange(len(self.order), device=self.order.device)
        # A search in the sorted experts counts them without bincount's synchronisation and histc's atomic additions.
        numbers = torch.arange(count, device=self.experts.device, dtype=self.experts.dtype)
        self.offsets = torch.searchsorted(self.experts, numbers, right=True).int()

    @cached_property
    def ends(self) -> list[int]:
        """`offsets` on the host, after a 0. Asking for them is the only host synchronisation."""
        return [0, *self.offsets.tolist()]

    @property
    def sizes(self) -> Tensor:
        """The number of rows of each expert, (count,) int32."""
        return torch.diff(self.offsets, prepend=self.offsets.new_zeros(1))

    def dispatch(self, tokens: Tensor) -> Tensor:
        """Return the rows (T * k, D) of tokens (T, D), sorted by expert."""
        return _Dispatch.apply(tokens, self)  # type: ignore[return-value]

    def sort(self, rows: Tensor) -> Tensor:
        """(T * k, ...) in the order of tokens -> sorted by expert."""
        return _Permute.apply(rows, self.order, self.inverse)

    def restore(self, rows: Tensor) -> Tensor:
        """(T * k, D) sorted by expert -> (T, k, D)."""
        return _Permute.apply(rows, self.inverse, self.order).unflatten(0, (-1, self.each))

    def combine(self, rows: Tensor) -> Tensor:
        """(T * k, D) sorted by expert -> (T, D), the sum of each token's rows."""
        return _Combine.apply(rows, self)  # type: ignore[return-value]

    def added(self, rows: Tensor) -> Tensor:
        """As `combine`, but not differentiable, and in one kernel if there is one."""
        if not can_launch(rows.device.type):
            return rows[self.inverse].unflatten(0, (-1, self.each)).sum(1)
        from trainer.model.kernels.mixture import combined

        return combined(rows, self.inverse, self.each)

    def product(self, rows: Tensor, matrices: Tensor, first: int = 0, *, in_fp8: bool = False) -> Tensor:
        """Multiply the rows of experts [first, first + n) by the experts' matrices (n, in, out). `rows` (T * k, in) are
        those of all experts. Not differentiable. It costs the host synchronisation if these are not all experts, or if
        PyTorch multiplies and sizes are not multiples of 16 bytes. `in_fp8` asks for trainer/model/kernels/fp8.py."""
        if len(matrices) == len(self.offsets):
            offsets = self.offsets
        else:
            begin, end = self.ends[first], self.ends[first + len(matrices)]
            rows, offsets = rows[begin:end], self.offsets[first : first + len(matrices)] - begin
        if in_fp8:
            return fp8.product_of_groups(rows, matrices, offsets)
        if rows.itemsize == 2 and lacks_grouped_products(rows.device):
            from trainer.model.kernels.multiply import by_matrices, tiles_of

            return by_matrices(rows, matrices, tiles_of(offsets, len(rows)))
        if _fits(rows, matrices.shape[-1]):
            return nn.functional.grouped_mm(_aligned(rows), _aligned(matrices), offs=offsets)
        result = rows.new_empty(len(rows), matrices.shape[-1])
        begin = self.ends[first]
        for index, (start, end) in enumerate(pairwise(self.ends[first : first + len(matrices) + 1])):
            torch.mm(rows[start - begin : end - begin], matrices[index], out=result[start - begin : end - begin])
        return result

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """left (T * k, a) and right (T * k, b) -> (count, a, b): left^T right of each expert's rows. Not
        differentiable.
        """
        if left.itemsize == 2 and lacks_grouped_products(left.device):
            from trainer.model.kernels.multiply import with_others

            return with_others(left, right, self.offsets)
        if _fits(left, right.shape[-1]):
            products = nn.functional.grouped_mm(_aligned(left).mT, _aligned(right), offs=self.offsets)
            # On some GPUs the kernel does not write the products of experts without rows (pytorch/pytorch#172439).
            return torch.where((self.sizes > 0)[:, None, None], products, 0)
        return torch.stack([left[start:end].mT @ right[start:end] for start, end in pairwise(self.ends)])


def _fits(rows: Tensor, outputs: int) -> bool:
    """Whether the rows, and the rows of `outputs` numbers that are made of them, are aligned for torch's kernel."""
    return not any(size * rows.itemsize % ALIGNMENT for size in (rows.shape[-1], outputs))


def _aligned(tensor: Tensor) -> Tensor:
    """Return the tensor aligned for torch's kernel. ZeRO-3 gathers parameters one after another, at any address."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


class _Dispatch(Function):
    """Copies each token's row to its k places. The gradient is a gather and a sum of k rows; autograd would add
    atomically.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, groups: Groups) -> Tensor:
        ctx.groups = groups
        return tokens[groups.order // groups.each]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.groups.added(grad), None


class _Combine(Function):
    """The inverse of `_Dispatch`. It saves no tensor, so that a recomputation may end before it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, groups: Groups) -> Tensor:
        ctx.groups = groups
        return groups.added(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        groups: Groups = ctx.groups
        return grad[groups.order // groups.each], None


class _Permute(Function):
    """rows[index], where `inverse` is the inverse permutation of `index`: its gradient is a gather."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None
