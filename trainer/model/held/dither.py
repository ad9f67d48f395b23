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

_BITS = 15
"""The bits of a threshold. The mantissa of fp32 holds a code of 8 bits and this many bits behind the point."""
# The bits of the mantissa and the least normal number of each kind of floating-point code. Without the sign, such codes
# are in the order of their values.
_FLOATS = {"e2m1": (1, 1.0), "e4m3": (3, 2.0**-6)}
_MANTISSA = 23  # of fp32


def thresholds(name: str, rows: Tensor, columns: Tensor) -> Tensor:
    """Return int32 numbers (rows, columns) in [0, 2**15), one for each place of the weight `name`.

    `rows` and `columns` are the numbers (int64) of the rows and columns in the whole weight. The rows of a stack are
    counted over all of its matrices.
    """
    of_rows, of_columns = _hashed(rows, f"{name} rows"), _hashed(columns, f"{name} columns")
    return of_rows[:, None].add(of_columns).bitwise_and_(2**_BITS - 1)


def moved(numbers: Numbers, codes: Tensor, steps: Tensor, at: Tensor | None) -> Tensor:
    """Return the codes (uint8) of weights that had `codes` and have moved by `steps`, fp32 in units of their scales.

    `at` has the thresholds; None rounds to the nearest code. Codes for NaN stay. So do codes whose step is not finite,
    because their scale is 0.
    """
    steps = steps.nan_to_num(0.0, 0.0, 0.0)
    # Only arithmetic follows, as a choice (torch.where) takes a CPU thirty times as long.
    if numbers in _FLOATS:
        return _moved_floats(numbers, codes, steps, at)
    flipped = 128 if numbers == "int8" else 0  # the order of two's complements begins at code 128
    place = codes.bitwise_xor(flipped).float() if flipped else codes.float()
    place += steps
    place += 0.5 if at is None else at.float().add_(0.5).mul_(2.0**-_BITS)
    found = place.floor_().clamp_(0, len(VALUES[numbers]) - 1).to(torch.uint8)
    return found.bitwise_xor_(flipped) if flipped else found


def _moved_floats(numbers: Numbers, codes: Tensor, steps: Tensor, at: Tensor | None) -> Tensor:
    """As `moved`. In the order of the values, the place of a code is a whole number, and places are linear between
    codes."""
    mantissa, normal = _FLOATS[numbers]
    sign, behind = len(VALUES[numbers]) // 2, _MANTISSA - mantissa
    table = _values(numbers, codes.device)
    sought = table.index_select(0, codes.flatten().int()).view(codes.shape).add_(steps)
    place = _with_sign(_place_of_size(sought.abs().clamp_(max=float(table.max())), normal), sought.view(torch.int32))
    place += 2 ** (behind - 1) if at is None else (at << (behind - _BITS)).add_(2 ** (behind - _BITS - 1))
    place >>= behind
    negative = place >> 31  # -1 or 0
    found = place.bitwise_xor_(negative).sub_(negative).add_(negative.bitwise_and_(sign)).to(torch.uint8)
    return _kept_where_equal(found, codes, sign, nan=numbers == "e4m3")


def _place_of_size(size: Tensor, normal: float) -> Tensor:
    """Return the place of values >= 0 in units of 2**-23 of the distance of two exponents, int32.

    Up to the least normal number places are linear. Behind it they are the bits of fp32, which are larger there and
    smaller before it.
    """
    linear = size.clamp(max=normal).mul_(2.0**_MANTISSA / normal).int()
    return torch.maximum(linear, size.view(torch.int32) - (_bits_of(normal) - 2**_MANTISSA))


def _with_sign(number: Tensor, of: Tensor) -> Tensor:
    """Give numbers >= 0 the sign of others, all of them int32, in place."""
    negative = of >> 31
    return number.bitwise_xor_(negative).sub_(negative)


def _kept_where_equal(found: Tensor, codes: Tensor, sign: int, *, nan: bool) -> Tensor:
    """Return the found codes, with the old ones of those that stand for -0, and still do for 0, and for NaN."""
    was_less = codes.bitwise_xor(sign).bitwise_or_(found).clamp_(max=1).sub_(1).bitwise_and_(sign)
    found = found.add_(was_less)
    if not nan:
        return found
    real = codes.bitwise_and(sign - 1).add_(1).bitwise_right_shift_(7).sub_(1)  # 255, and 0 for NaN
    return found.bitwise_and_(real).bitwise_or_(codes.bitwise_and(real.bitwise_not_()))


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """Bytes (rows, n) -> codes (rows, n * 8 / bits). The first of two codes in a byte is the lower half."""
    return packed if bits == 8 else torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def packed(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpacked`."""
    return codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4


def _hashed(numbers: Tensor, salt: str) -> Tensor:
    """Return int32 hashes of `_BITS` bits."""
    return _mixed(_mixed(numbers) ^ crc32(salt.encode())).bitwise_right_shift_(32 - _BITS).int()


def _mixed(numbers: Tensor) -> Tensor:
    """Permute 32-bit numbers; each bit depends on all others (lowbias32, nullprogram.com/blog/2018/07/31)."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        numbers = numbers ^ numbers >> shift
        numbers = (numbers * factor) & 0xFFFFFFFF
    return numbers ^ numbers >> 16


def _bits_of(number: float) -> int:
    return int(torch.tensor(number).view(torch.int32))


@cache
def _values(numbers: Numbers, device: torch.device) -> Tensor:
    """The values of all codes, fp32, with 0 for NaN."""
    return torch.tensor(VALUES[numbers], dtype=torch.float32, device=device).nan_to_num(0.0)
