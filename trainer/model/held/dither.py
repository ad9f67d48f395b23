"""Moves the codes of a weight by a change that is far smaller than the distance between two codes.

An adapter changes a weight by some 3 % of a 4-bit step, so rounding to the nearest code would give the base back. A
dither compares the part of a step that a weight should move by with a threshold between 0 and 1. If weights should move
by a fraction d of a step, that fraction of them moves by a whole step. So a sum over many weights moves by what the
adapter says. Scales never change.

The threshold is a function of place: the fractional part of a number of the row plus a number of the column. Both
numbers are hashes, so any two thresholds are independent. Nothing of a weight's size is drawn or kept. Every part of a
weight gets the same codes, wherever and in whatever pieces it is computed. A weight that does not change keeps its
code.

All operations here are elementwise, on whole numbers or in fp32, so they give the same bits on every device. The same
code computes the forward pass of a training and the export. `exact_product` of trainer/tuning/method.py says why the
change that it is given is the same, too.
"""

from functools import cache
from zlib import crc32

import torch
from torch import Tensor

from trainer.model.held.codes import VALUES, Numbers

_BITS, UNIT = 15, 22
"""The random bits of a threshold, and those behind the point. The mantissa of fp32 holds a code of 8 bits and the
random ones; each threshold is in the middle between two multiples of 2**-15."""
# The bits of the mantissa and the least normal number of each kind of floating-point code. Without the sign, such codes
# are in the order of their values.
FLOATS = {"e2m1": (1, 1.0), "e4m3": (3, 2.0**-6)}
_MANTISSA = 23  # of fp32


def thresholds(name: str, rows: Tensor, columns: Tensor) -> Tensor:
    """Return int32 numbers (rows, columns) in (0, 2**22), one for each place of the weight `name`, in units of 2**-22.

    `rows` and `columns` are the numbers (int64) of the rows and columns in the whole weight. The rows of a stack are
    counted over all of its matrices.
    """
    return between(numbers_of_rows(name, rows), numbers_of_columns(name, columns))


def numbers_of_rows(name: str, rows: Tensor) -> Tensor:
    """Return what `between` needs of rows, int32."""
    return _hashed(rows, f"{name} rows").add_(2 ** (UNIT - _BITS - 1))


def numbers_of_columns(name: str, columns: Tensor) -> Tensor:
    """Return what `between` needs of columns, int32."""
    return _hashed(columns, f"{name} columns")


def between(down: Tensor, across: Tensor) -> Tensor:
    """Return the thresholds of places whose rows and columns have these numbers. Exchange both for the transpose."""
    return down[:, None].add(across).bitwise_and_(2**UNIT - 1)


def moved(numbers: Numbers, codes: Tensor, steps: Tensor, at: Tensor | None) -> Tensor:
    """Return the codes (uint8) of weights that had `codes` and have moved by `steps`, fp32 in units of their scales.

    `at` has the thresholds; None rounds to the nearest code. Codes for NaN stay. So do codes whose step is not finite,
    because their scale is 0. What `steps` and `at` hold is lost.
    """
    steps.nan_to_num_(0.0, 0.0, 0.0)
    # Only arithmetic follows, most of it in place: on a CPU a choice (torch.where) takes thirty times as long as a sum,
    # fp32 to uint8 three times as long as by way of int32, and new tensors would not fit its cache.
    if numbers in FLOATS:
        return _moved_floats(numbers, codes, steps, at)
    flipped = 128 if numbers == "int8" else 0  # the order of two's complements begins at code 128
    place = (codes.bitwise_xor(flipped) if flipped else codes).float().add_(steps)
    place.add_(0.5) if at is None else place.add_(at.float(), alpha=2.0**-UNIT)
    found = place.clamp_(0, len(VALUES[numbers]) - 1).int().to(torch.uint8)
    return found.bitwise_xor_(flipped) if flipped else found


def _moved_floats(numbers: Numbers, codes: Tensor, steps: Tensor, at: Tensor | None) -> Tensor:
    """As `moved`. Without its sign, the place of a code is a whole number, and places are linear between codes.

    A negative place is rounded down where its size is rounded up. So the thresholds of negative weights are taken from
    the other end: exclusive or with -1 turns t into 1 - t.
    """
    mantissa, normal = FLOATS[numbers]
    sign, behind = len(VALUES[numbers]) // 2, _MANTISSA - mantissa
    largest = max(value for value in VALUES[numbers] if value == value)
    sought = _values(numbers, codes).add_(steps)
    negative = sought.view(torch.int32) >> 31  # -1 or 0
    place = _place_of_size(sought.abs_().clamp_(max=largest), normal)
    if at is None:
        place += negative.bitwise_xor(2 ** (behind - 1)).bitwise_and_(2**behind - 1)
    else:
        at = at.bitwise_right_shift_(UNIT - behind) if behind < UNIT else at
        place += at.bitwise_xor_(negative).bitwise_and_(2**behind - 1)
    place >>= behind
    size = place.to(torch.uint8)
    found = size.add(sign - 1).bitwise_and_(negative.to(torch.uint8)).bitwise_and_(sign).bitwise_or_(size)
    return _kept_where_equal(found, codes, sign, nan=numbers == "e4m3")


def _place_of_size(size: Tensor, normal: float) -> Tensor:
    """Return the place of values >= 0 in units of 2**-23 of the distance of two exponents, int32.

    Up to the least normal number places are linear. Behind it they are the bits of fp32, which are larger there and
    smaller before it.
    """
    linear = size.clamp(max=normal).mul_(2.0**_MANTISSA / normal).int()
    bits = size.view(torch.int32).sub_(_bits_of(normal) - 2**_MANTISSA)
    return torch.maximum(linear, bits, out=bits)


def _kept_where_equal(found: Tensor, codes: Tensor, sign: int, *, nan: bool) -> Tensor:
    """Return the found codes, with the old ones of those that stand for -0, and still do for 0, and for NaN."""
    was_less = codes.bitwise_xor(sign).bitwise_or_(found).clamp_(max=1).sub_(1).bitwise_and_(sign)
    found = found.add_(was_less)
    if not nan:
        return found
    real = codes.bitwise_and(sign - 1).add_(1).bitwise_right_shift_(7).sub_(1)  # 255, and 0 for NaN
    return found.bitwise_xor_(codes).bitwise_and_(real).bitwise_xor_(codes)


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """Bytes (rows, n) -> codes (rows, n * 8 / bits). The first of two codes in a byte is the lower half."""
    if bits == 8:
        return packed
    pairs = packed.to(torch.int16)  # of bytes, the first of which is the lower one
    return (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F).view(torch.uint8)


def packed(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpacked`."""
    if bits == 8:
        return codes
    pairs = codes.contiguous().view(torch.int16)
    return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)


def _hashed(numbers: Tensor, salt: str) -> Tensor:
    """Return int32 hashes of `_BITS` bits, in units of 2**-22."""
    return _mixed(_mixed(numbers) ^ crc32(salt.encode())).bitwise_right_shift_(32 - _BITS).int() << (UNIT - _BITS)


def _mixed(numbers: Tensor) -> Tensor:
    """Permute 32-bit numbers; each bit depends on all others (lowbias32, nullprogram.com/blog/2018/07/31)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        numbers = numbers ^ numbers >> shift
        numbers = (numbers * factor) & 0xFFFFFFFF
    return numbers ^ numbers >> 16


def _bits_of(number: float) -> int:
    return int(torch.tensor(number).view(torch.int32))


def _values(numbers: Numbers, codes: Tensor) -> Tensor:
    """The values of codes, fp32, with 0 for NaN.

    Two codes of 4 bits are looked up as one number of 8 bytes, which is four times as fast on a CPU.
    """
    pairs = len(VALUES[numbers]) == 16 and codes.is_contiguous() and codes.shape[-1] % 2 == 0
    places = codes.view(torch.int16) if pairs else codes
    return (
        _table(numbers, pairs, codes.device)
        .index_select(0, places.flatten().int())
        .view(torch.float32)
        .view(codes.shape)
    )


@cache
def _table(numbers: Numbers, pairs: bool, device: torch.device) -> Tensor:
    """The value of each code, or with `pairs` two of them as fp64, for two codes that lie in the halves of an int16."""
    values = torch.tensor(VALUES[numbers], dtype=torch.float32).nan_to_num(0.0)
    if pairs:
        places = torch.arange(0x0F0F + 1)
        values = torch.stack([values[places & 15], values[places >> 8]], 1).view(torch.float64)[:, 0]
    return values.to(device)
