"""Products of groups of rows in 16 bits, by Triton kernels for GPUs for which PyTorch has no fast ones.

    by matrices  rows (S, inputs) of sorted groups, a matrix (inputs, outputs) for each -> (S, outputs)
    with others  left (S, a), right (S, b) -> left^T right of each group's rows, (groups, a, b)

torch.nn.functional.grouped_mm is one kernel only on compute capability 9 and 10 (pytorch/pytorch#186620). Elsewhere it
multiplies group by group, and the host waits for the sizes of the groups. Here the sizes stay on the device: as many
programs start as there can be tiles, and those after the last tile return at once. Nothing is added atomically and
every sum has one order, so the same bits come out every time.
"""

from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]  # PyTorch's builds for CUDA bring it
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

ROWS, WIDE, INNER = 128, 128, 32
"""A program's tile of results, and how much of a sum it adds at a time. Three stages take 48 KiB of shared memory,
which every GPU since Ampere has."""
OPTIONS = {"num_warps": 8, "num_stages": 3}


class Tiles(NamedTuple):
    """For each tile of rows its group (-1 for none), its first row, and the end of its group's rows: int32, on the
    device."""

    group: Tensor
    begin: Tensor
    end: Tensor


def tiles_of(offsets: Tensor, rows: int, size: int | None = None) -> Tiles:
    """Return tiles of `size` rows. offsets (groups,) int32: group g has the rows [offsets[g - 1], offsets[g])."""
    size = size or ROWS
    begins = torch.cat([offsets.new_zeros(1), offsets[:-1]])
    last = torch.cumsum((offsets - begins + size - 1) // size, 0)  # the end of each group's tiles
    number = torch.arange(rows // size + min(rows, len(offsets)), device=offsets.device)
    group = torch.searchsorted(last, number, right=True)
    there = group < len(offsets)
    known = torch.where(there, group, 0)
    before = torch.where(known > 0, last[known - 1], 0)
    begin = begins[known] + (number - before) * size
    return Tiles(torch.where(there, group, -1).int(), begin.int(), offsets[known].int())


@triton.jit
def multiply_by_matrices(
    rows, matrices, result, tile_group, tile_begin, tile_end, across, inputs, outputs, of_group, of_input, of_output,
    ROWS: tl.constexpr, WIDE: tl.constexpr, INNER: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A program makes a tile of `result`, which has `across` tiles beside each other. `of_group`, `of_input` and
    `of_output` are the strides of the matrices. `EVEN` says that `inputs` is a multiple of a portion."""
    tile = tl.program_id(0) // across
    group = tl.load(tile_group + tile)
    if group < 0:
        return
    row, end = tl.load(tile_begin + tile) + tl.arange(0, ROWS), tl.load(tile_end + tile)
    read = tl.minimum(row, end - 1).to(tl.int64)  # rows after the last one read it instead; their results are not kept
    output = (tl.program_id(0) - tile * across) * WIDE + tl.arange(0, WIDE)
    inner = tl.arange(0, INNER)
    left = rows + read[:, None] * inputs + inner[None, :]
    right = matrices + group.to(tl.int64) * of_group + inner[:, None] * of_input + output[None, :] * of_output
    total = tl.zeros((ROWS, WIDE), dtype=tl.float32)
    for begin in range(0, inputs, INNER):
        if EVEN:
            x, w = tl.load(left), tl.load(right, (output < outputs)[None, :], other=0.0)
        else:
            x = tl.load(left, (begin + inner < inputs)[None, :], other=0.0)
            w = tl.load(right, (begin + inner < inputs)[:, None] & (output < outputs)[None, :], other=0.0)
        total = tl.dot(x, w, total, input_precision="ieee")
        left += INNER
        right += INNER * of_input
    place = result + row.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(place, total.to(result.dtype.element_ty), (row < end)[:, None] & (output < outputs)[None, :])


@triton.jit
def multiply_with_others(
    left, right, result, offsets, tall, wide, ROWS: tl.constexpr, WIDE: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """A program makes a tile of one group's product, a sum over the group's rows. It is zero if the group has none."""
    group = tl.program_id(2)
    row = tl.load(offsets + group - 1, group > 0, other=0)
    end = tl.load(offsets + group)
    down = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    across = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    total = tl.zeros((ROWS, WIDE), dtype=tl.float32)
    for begin in range(row, end, INNER):
        place = begin + tl.arange(0, INNER)
        there, of_row = (place < end)[:, None], place.to(tl.int64)[:, None]
        x = tl.load(left + of_row * tall + down[None, :], there & (down < tall)[None, :], other=0.0)
        y = tl.load(right + of_row * wide + across[None, :], there & (across < wide)[None, :], other=0.0)
        total = tl.dot(tl.trans(x), y, total, input_precision="ieee")
    place = result + group.to(tl.int64) * tall * wide + down[:, None] * wide + across[None, :]
    tl.store(place, total.to(result.dtype.element_ty), (down < tall)[:, None] & (across < wide)[None, :])


def by_matrices(rows: Tensor, matrices: Tensor, tiles: Tiles) -> Tensor:
    """rows (S, inputs) by matrices (groups, inputs, outputs), in any order in memory -> (S, outputs)."""
    rows, (_, inputs, outputs) = rows.contiguous(), matrices.shape
    result = rows.new_empty(len(rows), outputs)
    if result.numel():
        kernel: Any = multiply_by_matrices
        across = triton.cdiv(outputs, WIDE)
        assert INNER * matrices.stride(1) < 2**31, "places within a portion of a matrix have 32 bits"
        assert outputs * matrices.stride(2) < 2**31, "places within a row of a matrix have 32 bits"
        kernel[(across * len(tiles.group),)](
            rows, matrices, result, *tiles, across, inputs, outputs, *matrices.stride(),
            ROWS=ROWS, WIDE=WIDE, INNER=INNER, EVEN=inputs % INNER == 0, **OPTIONS,
        )  # fmt: skip
    return result


def with_others(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """left (S, a), right (S, b), offsets (groups,) int32 -> (groups, a, b)."""
    left, right = left.contiguous(), right.contiguous()
    (tall, wide), groups = (left.shape[1], right.shape[1]), len(offsets)
    assert tall * wide < 2**31, "places within a product have 32 bits"
    result = left.new_empty(groups, tall, wide)
    kernel: Any = multiply_with_others
    grid = (triton.cdiv(tall, ROWS), triton.cdiv(wide, WIDE), groups)
    kernel[grid](left, right, result, offsets, tall, wide, ROWS=ROWS, WIDE=WIDE, INNER=INNER, **OPTIONS)
    return result
