"""Elementwise work of a mixture of experts in one pass over memory each, by Triton kernels for GPUs.

    gated     rows (S, 2 I) of gates and ups, and each row's routing weight -> weight * silu(gate) * up, (S, I)
    combined  rows (S, D) sorted by expert -> the sum of each token's k rows, (S / k, D)

The routing weight is applied before the down-projection, which is linear. Its gradient then needs the inputs of that
product and not its result, so a layer that is computed again ends before the product. Everything is computed in fp32
and rounded once. Nothing is added atomically.
"""

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]  # PyTorch's builds for CUDA bring it
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.autograd import Function

_COLUMNS = 1024  # columns that a program computes at a time: 16 bytes of 16-bit values for each of 128 threads


@triton.jit
def gate_rows(both, weights, result, inner, COLUMNS: tl.constexpr):
    """A program makes a row of `result`."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row).to(tl.float32)
    both += row * 2 * inner
    for begin in range(0, inner, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        gate = tl.load(both + column, column < inner, other=0.0).to(tl.float32)
        up = tl.load(both + inner + column, column < inner, other=0.0).to(tl.float32)
        value = weight * (gate * tl.sigmoid(gate) * up)
        tl.store(result + row * inner + column, value.to(result.dtype.element_ty), column < inner)


@triton.jit
def gate_rows_back(grads, both, weights, of_both, of_weights, inner, COLUMNS: tl.constexpr):
    """A program makes the gradients of a row and of its weight."""
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights + row).to(tl.float32)
    both += row * 2 * inner
    of_both += row * 2 * inner
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    kind = of_both.dtype.element_ty
    for begin in range(0, inner, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        grad = tl.load(grads + row * inner + column, column < inner, other=0.0).to(tl.float32)
        gate = tl.load(both + column, column < inner, other=0.0).to(tl.float32)
        up = tl.load(both + inner + column, column < inner, other=0.0).to(tl.float32)
        share = tl.sigmoid(gate)
        silu = gate * share
        total += grad * silu * up
        grad *= weight
        of_gate = grad * up * (share + silu * (1 - share))
        tl.store(of_both + column, of_gate.to(kind), column < inner)
        tl.store(of_both + inner + column, (grad * silu).to(kind), column < inner)
    tl.store(of_weights + row, tl.sum(total, 0).to(of_weights.dtype.element_ty))


@triton.jit
def combine_rows(rows, places, result, width, EACH: tl.constexpr, COLUMNS: tl.constexpr):
    """A program makes some columns of a token's sum. `places` (S,) int64 says where its rows are."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for number in tl.static_range(EACH):
        place = tl.load(places + token * EACH + number).to(tl.int64)
        total += tl.load(rows + place * width + column, column < width, other=0.0).to(tl.float32)
    tl.store(result + token * width + column, total.to(result.dtype.element_ty), column < width)


def gated(both: Tensor, weights: Tensor) -> Tensor:
    """both (S, 2 I), contiguous: gates, then ups; weights (S,) -> (S, I) in the type of `both`."""
    return _Gated.apply(both, weights)  # type: ignore[return-value]


def combined(rows: Tensor, places: Tensor, each: int) -> Tensor:
    """rows (S, D), places (S,) int64 -> (S / each, D). A token has `each` consecutive places. Not differentiable."""
    rows = rows.contiguous()
    result = rows.new_empty(len(rows) // each, rows.shape[1])
    if result.numel():
        kernel: Any = combine_rows
        grid = (len(result), triton.cdiv(rows.shape[1], _COLUMNS))
        kernel[grid](rows, places, result, rows.shape[1], EACH=each, COLUMNS=_COLUMNS)
    return result


class _Gated(Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor, weights: Tensor) -> Tensor:
        both, weights = both.contiguous(), weights.contiguous()
        ctx.save_for_backward(both, weights)
        result = both.new_empty(len(both), both.shape[1] // 2)
        if result.numel():
            kernel: Any = gate_rows
            kernel[(len(result),)](both, weights, result, result.shape[1], COLUMNS=_COLUMNS)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        both, weights = ctx.saved_tensors
        of_both, of_weights = torch.empty_like(both), torch.empty_like(weights)
        if both.numel():
            kernel: Any = gate_rows_back
            inner = both.shape[1] // 2
            kernel[(len(both),)](grad.contiguous(), both, weights, of_both, of_weights, inner, COLUMNS=_COLUMNS)
        return of_both, of_weights
