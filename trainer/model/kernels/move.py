"""Moves the codes of weights by a change, and decodes them, in one pass over memory: one Triton kernel.

What it computes is trainer/model/held/dither.py's, with the same bits: every operation is on whole numbers, or one in
fp32 that is rounded by itself. No two operations are fused, and division is rounded as IEEE 754 says. Scales, zeros and
tiles are those of trainer/model/kernels/decode.py. The codes are not written: the layer multiplies by their numbers,
and an export makes the same codes anew.

The change comes as fp32, in the order of the weights. It is a product whose sums are in fp64
(`exact_product` of trainer/tuning/method.py), which PyTorch makes for some rows at a time.
"""

from math import prod
from typing import Any, NamedTuple, cast

import torch
import triton  # pyright: ignore[reportMissingImports]  # PyTorch's builds for CUDA bring it
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from trainer.model.held import dither
from trainer.model.held.codes import VALUES
from trainer.model.held.codes import Numbers as OfFiles
from trainer.model.kernels import decode
from trainer.model.kernels.decode import Beside, Numbers, Tiling, number_of, shared_by_units

WEIGHTS = 1024
"""The weights that a program makes. Each takes more registers than in decode.py, for its change and its threshold."""


@triton.jit
def _moved_float(
    code, steps, at, table, NUMBERS: tl.constexpr, BEHIND: tl.constexpr, SIGN: tl.constexpr, NORMAL: tl.constexpr,
    LARGEST: tl.constexpr, UNIT_BITS: tl.constexpr,
):  # fmt: skip
    """As `_moved_floats` of dither.py. A place has `BEHIND` bits behind the point."""
    number = number_of(code, table, NUMBERS)
    if NUMBERS == "e4m3":
        number = tl.where((code & (SIGN - 1)) == SIGN - 1, 0.0, number)
    sought = number + steps
    negative = sought.to(tl.int32, bitcast=True) >> 31  # -1 or 0
    size = tl.minimum(tl.abs(sought), LARGEST)
    linear = (tl.minimum(size, NORMAL) * (8388608.0 / NORMAL)).to(tl.int32)
    one: tl.constexpr = NORMAL
    normal = tl.full((), one, tl.float32).to(tl.int32, bitcast=True)
    place = tl.maximum(linear, size.to(tl.int32, bitcast=True) - (normal - 8388608))
    place += ((at >> (UNIT_BITS - BEHIND)) ^ negative) & ((1 << BEHIND) - 1)
    size = place >> BEHIND
    less = (negative != 0) & (size != 0)
    found = tl.where(less | ((code == SIGN) & (size == 0)), size | SIGN, size)
    return tl.where((code & (SIGN - 1)) == SIGN - 1, code, found) if NUMBERS == "e4m3" else found


@triton.jit
def _moved_whole(code, steps, at, FLIPPED: tl.constexpr, LAST: tl.constexpr, THRESHOLD: tl.constexpr):
    """As `moved` of dither.py, of numbers that are whole."""
    place = (code ^ FLIPPED).to(tl.float32) + steps
    place = place + at.to(tl.float32) * THRESHOLD
    return tl.minimum(tl.maximum(place, 0.0), LAST).to(tl.int32) ^ FLIPPED


@triton.jit
def move(
    codes, scales, seconds, zeros, change, down, across, values,
    numel, slice_bytes, slice_scales, slice_rows, slice_down, slice_across, programs,
    row_units, tile_units, tile_rows, row_tiles,
    NUMBERS: tl.constexpr, BITS: tl.constexpr, SCALES: tl.constexpr, SECONDS: tl.constexpr, ZEROS: tl.constexpr,
    UNIT: tl.constexpr, UNITS: tl.constexpr, PER: tl.constexpr, EVEN: tl.constexpr, ROUNDED: tl.constexpr,
    FLOATS: tl.constexpr, BEHIND: tl.constexpr, SIGN: tl.constexpr, NORMAL: tl.constexpr, LARGEST: tl.constexpr,
    UNIT_BITS: tl.constexpr,
):  # fmt: skip
    """As `decode`. `change` has fp32 numbers in the order of `values`; `down` and `across` have the dither's numbers of
    the rows and columns, int32. A slice's begin at a multiple of `slice_down` and `slice_across`."""
    number = tl.program_id(0)
    piece = number // programs
    part = number - piece * programs
    begin = part.to(tl.int64) * (UNITS * UNIT)
    left = numel - begin
    unit = tl.arange(0, UNITS)
    there = unit * UNIT < left
    BYTES: tl.constexpr = UNIT * BITS // 8
    scale, zero = shared_by_units(
        scales, seconds, zeros, scales, scales, scales, codes, piece, part, unit, there,
        slice_scales, slice_rows, 0, row_units, tile_units, tile_rows, row_tiles,
        NUMBERS, SCALES, SECONDS, ZEROS, 1, UNITS, PER, EVEN,
    )  # fmt: skip

    byte = unit[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    from_bytes = codes + (piece.to(tl.int64) * slice_bytes + begin * BITS // 8) + byte
    bytes_left = slice_bytes - begin * BITS // 8
    loaded = tl.load(from_bytes) if EVEN else tl.load(from_bytes, byte < bytes_left, other=0)
    code = tl.interleave(loaded & 15, loaded >> 4).to(tl.int32) if BITS == 4 else loaded.to(tl.int32)

    weight = unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    place = piece.to(tl.int64) * numel + begin
    by = tl.load(change + place + weight) if EVEN else tl.load(change + place + weight, weight < left, other=0.0)
    steps = tl.div_rn(by, scale + tl.zeros_like(by))
    steps = tl.where(tl.abs(steps) < float("inf"), steps, 0.0)
    within = part * UNITS + unit
    row = within // row_units
    column = ((within - row * row_units) * UNIT)[:, None] + tl.arange(0, UNIT)[None, :]
    of_row, of_column = (
        down + piece.to(tl.int64) * slice_down + row,
        across + piece.to(tl.int64) * slice_across + column,
    )
    if EVEN:
        at = tl.load(of_row)[:, None] + tl.load(of_column)
    else:
        at = tl.load(of_row, there, other=0)[:, None] + tl.load(of_column, there[:, None], other=0)
    at = at & ((1 << UNIT_BITS) - 1)
    if FLOATS:
        code = _moved_float(code, steps, at, codes, NUMBERS, BEHIND, SIGN, NORMAL, LARGEST, UNIT_BITS)
    else:
        code = _moved_whole(code, steps, at, SIGN, LARGEST, NORMAL)
    made = ((number_of(code, codes, NUMBERS) - zero) * scale).to(ROUNDED).to(values.dtype.element_ty)
    if EVEN:
        tl.store(values + place + weight, made)
    else:
        tl.store(values + place + weight, made, weight < left)


class Moving(NamedTuple):
    """The `change` (slices * rows, columns) fp32 of weights, as they lie in the files, and the dither's numbers, int32.

    `down` has those of all rows, or of the rows of each slice alike, and `across` likewise those of the columns."""

    change: Tensor
    down: Tensor
    across: Tensor


def tiling(shape: tuple[int, int], tile: tuple[int, int], bits: int) -> Tiling | None:
    """As `decode.tiling`, with units that lie in one row each."""
    rows, columns = shape
    down, across = tile
    whole = down >= rows > 1 and across >= columns
    found = decode.tiling((rows, columns), (rows - 1, across) if whole else tile, bits)
    if found is None or columns % found.unit:
        return None
    found = found._replace(row_units=columns // found.unit)
    return found._replace(tile_rows=rows) if whole else found


def decode_moved(
    codes: Tensor,
    scales: Tensor,
    numbers: Numbers,
    tiles: Tiling,
    moving: Moving,
    into: Tensor,
    beside: Beside = Beside(),  # noqa: B008  # it cannot be changed
) -> None:
    """Write matrices `into` (slices, rows, columns). Codes (bytes,) uint8 and scales (n,), floats of any type, are
    those of all matrices, one after another."""
    (slices, rows, columns), numel = into.shape, prod(into.shape[1:])
    assert rows * tiles.row_units < 2**31, "units of a matrix have 32 bits"
    assert moving.change.is_contiguous()
    assert into.is_contiguous()
    units = max(1, WEIGHTS // tiles.unit)
    programs = triton.cdiv(numel, units * tiles.unit)
    kernel: Any = move
    kernel[(slices * programs,)](
        codes, scales.view(torch.uint8) if scales.dtype in decode.BYTES else scales,
        codes if beside.seconds is None else beside.seconds, codes if beside.zeros is None else beside.zeros,
        *moving, into,
        numel, len(codes) // slices, len(scales) // slices, rows, rows if len(moving.down) > rows else 0,
        columns if len(moving.across) > columns else 0, programs, *tiles[2:],
        **constants(numbers, tiles, numel, scales.dtype, beside), enable_fp_fusion=False,
    )  # fmt: skip


def constants(numbers: Numbers, tiles: Tiling, numel: int, scales: torch.dtype, beside: Beside) -> dict[str, Any]:
    """Return what `move` is compiled with."""
    units = max(1, WEIGHTS // tiles.unit)
    known = decode.constants(numbers, tiles, numel, scales, None, beside)
    known |= {"UNITS": units, "EVEN": numel % (units * tiles.unit) == 0, "UNIT_BITS": dither.UNIT}
    del known["UPPER_FIRST"], known["NESTED"]
    of_code = VALUES[cast(OfFiles, numbers.name)]
    if numbers.name not in dither.FLOATS:
        flipped = 128 if numbers.name == "int8" else 0
        whole = {"SIGN": flipped, "LARGEST": float(len(of_code) - 1), "NORMAL": 2.0**-dither.UNIT}
        return known | {"FLOATS": False, "BEHIND": 0} | whole
    mantissa, normal = dither.FLOATS[numbers.name]
    largest = max(value for value in of_code if value == value)
    floats = {"BEHIND": 23 - mantissa, "SIGN": len(of_code) // 2, "NORMAL": normal, "LARGEST": largest}
    return known | {"FLOATS": True} | floats
