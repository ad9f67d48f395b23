"""Decodes codes of 4 or 8 bits to weights in one pass over memory: one Triton kernel for every way to hold them.

A weight is the number that its code stands for, times the scale of its tile, in fp32 and rounded once:

    numbers   int4, int8, offset8, e2m1, e4m3 (trainer/model/held/codes.py), computed; or those of a table
    zeros     none, or the code that means zero in each tile; its number is subtracted first
    scales    floats, powers of two (E8M0), e4m3, or 8-bit codes of scales with a scale and a mean (double quantization)
    seconds   none, or a float for each row that multiplies or divides its scales (NVFP4)

Matrices lie one after another, and one launch decodes all of them. If the weights of a scale are neighbours in memory,
as in a block or a group of a row, the scale's number follows from the weight's number; otherwise it follows from the
weight's row and column. A program computes its first place in 64 bits, because the experts of one layer may have more
than 2**32 weights, and the places after it in 32 bits.

The form of the masks decides how wide loads are: the compiler has to see that neighbours share a mask. It sees this in
`byte < bytes`, while `byte * 2 < weights` gives loads of single bytes. `python -m tests.kernels` checks the machine
code.
"""

from math import gcd, prod
from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]  # PyTorch's builds for CUDA bring it
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

WEIGHTS = 8192
"""The weights that a program makes. With fewer, the instructions before them count; with more, few programs share a
multiprocessor."""
_LONGEST = 64  # weights that a program treats as a unit with one scale
BYTES = {torch.uint8, torch.float8_e8m0fnu, torch.float8_e4m3fn}


@triton.jit
def _e4m3(code):
    """Return the numbers of bytes. The fields of the smaller float are put into a float of 32 bits, whose exponent has
    another bias. A product with a power of two corrects this, and makes subnormal numbers normal."""
    bits = ((code & 127) << 20) | ((code & 128) << 24)
    number = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120
    return tl.where((code & 127) == 127, float("nan"), number)


@triton.jit
def _e8m0(code):
    """Return 2**(code - 127), or NaN for 255."""
    bits = tl.where(code == 0, 1 << 22, code << 23)
    return tl.where(code == 255, float("nan"), bits.to(tl.float32, bitcast=True))


@triton.jit
def number_of(code, table, NUMBERS: tl.constexpr):
    """Return the numbers, fp32, that codes (unsigned, in int32) stand for."""
    if NUMBERS == "int4":
        number = (code - 8).to(tl.float32)
    elif NUMBERS == "offset8":
        number = (code - 128).to(tl.float32)
    elif NUMBERS == "int8":
        number = ((code << 24) >> 24).to(tl.float32)
    elif NUMBERS == "e2m1":
        bits = ((code & 7) << 22) | ((code & 8) << 28)
        number = bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2**126
    elif NUMBERS == "e4m3":
        number = _e4m3(code)
    else:
        number = tl.load(table + code)
    return number


@triton.jit
def shared_by_units(
    scales, seconds, zeros, nested, means, nested_table, table, piece, part, unit, there,
    slice_scales, slice_rows, slice_nested, row_units, tile_units, tile_rows, row_tiles,
    NUMBERS: tl.constexpr, SCALES: tl.constexpr, SECONDS: tl.constexpr, ZEROS: tl.constexpr, NESTED: tl.constexpr,
    UNITS: tl.constexpr, PER: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Return the scales, and the numbers of the codes that mean zero, of the units of program `part` in slice `piece`:
    (UNITS, 1) fp32 each. See `decode`."""
    if PER:
        tile = tl.arange(0, UNITS) // PER
        tile_begin = part.to(tl.int64) * UNITS // PER
    else:
        tile_begin = tl.zeros((), tl.int64)
    if not PER or SECONDS != "none":
        within = part * UNITS + unit
        row = within // row_units
    if not PER:
        tile = row // tile_rows * row_tiles + (within - row * row_units) // tile_units
    first_tile = piece.to(tl.int64) * slice_scales + tile_begin
    place = scales + first_tile + tile
    found = tl.load(place) if EVEN else tl.load(place, there, other=0)
    if SCALES == "nested":
        scale = tl.load(nested_table + found.to(tl.int32))
        scale = scale * tl.load(nested + piece.to(tl.int64) * slice_nested + tile_begin // NESTED)
        scale = scale + tl.load(means + piece)
    elif SCALES == "e8m0":
        scale = _e8m0(found.to(tl.int32))
    elif SCALES == "e4m3":
        scale = _e4m3(found.to(tl.int32))
    else:
        scale = found.to(tl.float32)
    if SECONDS != "none":
        place = seconds + piece.to(tl.int64) * slice_rows + row
        second = tl.load(place) if EVEN else tl.load(place, there, other=1.0)
        scale = scale * second if SECONDS == "times" else tl.div_rn(scale, second)
    if ZEROS:
        place = zeros + first_tile + tile
        zero = tl.load(place) if EVEN else tl.load(place, there, other=0)
        zero = number_of(zero.to(tl.int32), table, NUMBERS)[:, None]
    else:
        zero = tl.zeros((UNITS, 1), tl.float32)
    return scale[:, None], zero


@triton.jit
def decode(
    codes, scales, seconds, zeros, nested, means, nested_table, table, values,
    numel, slice_bytes, slice_scales, slice_rows, slice_nested, programs, row_units, tile_units, tile_rows, row_tiles,
    NUMBERS: tl.constexpr, BITS: tl.constexpr, UPPER_FIRST: tl.constexpr, SCALES: tl.constexpr, SECONDS: tl.constexpr,
    ZEROS: tl.constexpr, NESTED: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, PER: tl.constexpr,
    EVEN: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """A program makes `UNITS` units of `UNIT` weights each, in one slice of `numel` weights. `programs` make a slice.

    `PER` consecutive units have the same scale. If it is 0, scales belong to tiles: a row has `row_units` units and
    `row_tiles` tiles, and a tile is `tile_rows` by `tile_units`. `EVEN` says that all programs are full.
    """
    number = tl.program_id(0)
    piece = number // programs
    part = number - piece * programs
    begin = part.to(tl.int64) * (UNITS * UNIT)
    left = numel - begin
    unit = tl.arange(0, UNITS)
    there = unit * UNIT < left
    BYTES: tl.constexpr = UNIT * BITS // 8
    scale, zero = shared_by_units(
        scales, seconds, zeros, nested, means, nested_table, table, piece, part, unit, there,
        slice_scales, slice_rows, slice_nested, row_units, tile_units, tile_rows, row_tiles,
        NUMBERS, SCALES, SECONDS, ZEROS, NESTED, UNITS, PER, EVEN,
    )  # fmt: skip

    byte = unit[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    from_bytes = codes + (piece.to(tl.int64) * slice_bytes + begin * BITS // 8) + byte
    bytes_left = slice_bytes - begin * BITS // 8
    loaded = tl.load(from_bytes) if EVEN else tl.load(from_bytes, byte < bytes_left, other=0)
    kind = values.dtype.element_ty
    if BITS == 4:
        low, high = (loaded & 15).to(tl.int32), (loaded >> 4).to(tl.int32)
        low = ((number_of(low, table, NUMBERS) - zero) * scale).to(ROUNDED).to(kind)
        high = ((number_of(high, table, NUMBERS) - zero) * scale).to(ROUNDED).to(kind)
        made = tl.interleave(high, low) if UPPER_FIRST else tl.interleave(low, high)
    else:
        made = ((number_of(loaded.to(tl.int32), table, NUMBERS) - zero) * scale).to(ROUNDED).to(kind)
    weight = unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    into = values + (piece.to(tl.int64) * numel + begin) + weight
    if EVEN:
        tl.store(into, made)
    else:
        tl.store(into, made, weight < left)


class Numbers(NamedTuple):
    """The numbers of codes: by their `name` in trainer/model/held/codes.py, or by a `table` (16,) or (256,) fp32.

    The first of two codes in a byte is the lower half, or with `upper_first` the upper half. Products are first rounded
    to the type `rounded`.
    """

    name: str
    bits: int
    rounded: torch.dtype
    table: Tensor | None = None
    upper_first: bool = False


class Nested(NamedTuple):
    """The scales of scales that are 8-bit codes themselves. Each `block` of a slice has one of `scales` (slices * n,)
    fp32. `means` (slices,) fp32 are added, and `table` (256,) fp32 has the values of the codes."""

    scales: Tensor
    means: Tensor
    table: Tensor
    block: int


class Beside(NamedTuple):
    """How `seconds` (rows of all matrices,) fp32 change the scales of a row: none, times or over. `zeros`, uint8, has
    as many codes as there are scales."""

    by: str = "none"
    seconds: Tensor | None = None
    zeros: Tensor | None = None


class Tiling(NamedTuple):
    """How a kernel finds scales: see `decode`."""

    unit: int
    per: int
    row_units: int = 1
    tile_units: int = 1
    tile_rows: int = 1
    row_tiles: int = 1


def tiling(shape: tuple[int, int], tile: tuple[int, int], bits: int) -> Tiling | None:
    """Return the units of matrices of `shape` whose tiles of (rows, columns) have a scale each. Tiles at the borders
    may be cut off. None if two weights of a byte have different scales."""
    (rows, columns), (down, across) = shape, tile
    if down >= rows and across >= columns:
        units = -(-rows * columns // _LONGEST)
        return Tiling(_LONGEST, 1 << (units - 1).bit_length())
    if rows == 1 or (down == 1 and columns % across == 0):
        unit = _power_of_two(across)
        per = across // unit
        if per & (per - 1) == 0 and unit * bits >= 8:  # a power of two
            return Tiling(unit, per, max(1, columns // unit))
    across = min(across, columns)
    unit = _power_of_two(gcd(across, columns))
    row_units = columns // unit
    if unit * bits < 8 or rows * row_units >= 2**31:
        return None
    return Tiling(unit, 0, row_units, across // unit, min(down, rows), -(-columns // across))


def _power_of_two(number: int) -> int:
    """Return the largest power of two that divides it, at most `_LONGEST`."""
    return min(number & -number, _LONGEST)


def decode_matrices(
    codes: Tensor,
    scales: Tensor,
    numbers: Numbers,
    tiles: Tiling,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    nested: Nested | None = None,
    beside: Beside = Beside(),  # noqa: B008  # it cannot be changed
) -> Tensor:
    """Return matrices of `shape` in `dtype`. Codes (bytes,) uint8 and scales (n,) are those of all matrices, one after
    another.

    Scales are floats of any type, or uint8 with `nested`.
    """
    slices, numel = shape[0], prod(shape[1:])
    values = torch.empty(shape, dtype=dtype, device=codes.device)
    units = max(1, WEIGHTS // tiles.unit)
    programs = triton.cdiv(numel, units * tiles.unit)
    kernel: Any = decode
    kernel[(slices * programs,)](
        codes, scales.view(torch.uint8) if scales.dtype in BYTES else scales,
        codes if beside.seconds is None else beside.seconds, codes if beside.zeros is None else beside.zeros,
        *((nested.scales, nested.means, nested.table) if nested else (scales.view(torch.uint8),) * 3),
        codes if numbers.table is None else numbers.table, values,
        numel, len(codes) // slices, len(scales) // slices, shape[1], len(nested.scales) // slices if nested else 0,
        programs, *tiles[2:],
        **constants(numbers, tiles, numel, scales.dtype, nested, beside), enable_fp_fusion=False,
    )  # fmt: skip
    return values


def constants(
    numbers: Numbers, tiles: Tiling, numel: int, scales: torch.dtype, nested: Nested | None, beside: Beside
) -> dict[str, Any]:
    """Return what `decode` is compiled with."""
    units = max(1, WEIGHTS // tiles.unit)
    kinds = {torch.float8_e8m0fnu: "e8m0", torch.float8_e4m3fn: "e4m3"}
    return {
        "NUMBERS": "table" if numbers.table is not None else numbers.name,
        "BITS": numbers.bits,
        "UPPER_FIRST": numbers.upper_first,
        "SCALES": "nested" if nested else kinds.get(scales, "float"),
        "SECONDS": beside.by,
        "ZEROS": beside.zeros is not None,
        "NESTED": nested.block if nested else 1,
        "UNIT": tiles.unit,
        "UNITS": units,
        "PER": tiles.per,
        "EVEN": numel % (units * tiles.unit) == 0,
        "ROUNDED": _TYPES[numbers.rounded],
    }


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
