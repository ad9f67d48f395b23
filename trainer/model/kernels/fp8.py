"""Products with frozen weights in eight-bit floats (`train.products: fp8`). Both factors become e4m3 numbers, each of
their rows has its own scale, and sums are in fp32.

e4m3 is 1 sign, 4 exponent and 3 mantissa bits, at most 448 (arXiv:2209.05433). `torch._scaled_mm` multiplies such rows.
On GPUs it uses their FP8 units. On CPUs it follows the same rules: this takes longer than a plain product, and shows
what a GPU would learn.

The rows of a mixture's experts are multiplied by `torch._scaled_grouped_mm`, which is one kernel on GPUs of compute
capability 9.0 and 10.0. Each pass converts every expert, however few rows it gets, so that this pays for many rows
only.
"""

from itertools import pairwise

import torch
from torch import Tensor

from trainer.config.training import FP8_AT_ONCE
from trainer.errors import ConfigError

MULTIPLE = 16
"""Both sizes of a weight must be multiples of this for a GPU's FP8 units."""
_TOP = 8  # the largest value is below 2**8, of at most 448
_LEAST = -100  # the exponent of rows of zeros, or nearly
# cuBLAS or CUTLASS multiplies on these. GPUs from 12.0 on (RTX 50, RTX PRO) take only one scale a tensor
# (pytorch/pytorch#192707).
_SINCE, _BEFORE = (8, 9), (12, 0)
_GROUPED = ((9, 0), (10, 0))


def check(device: torch.device) -> None:
    """Raise `ConfigError` if the device has no such products."""
    if device.type != "cuda":
        return
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if torch.version.hip or not _SINCE <= capability < _BEFORE:
        raise ConfigError(
            f"train.products: fp8 cannot run on {name}. It needs an NVIDIA GPU of compute capability 8.9 to 11, such as"
            " L40S, H100 or B200. Set plain."
        )


def product(rows: Tensor, weight: Tensor) -> Tensor:
    """rows (..., k) by weight (n, k) -> (..., n), in the type of `rows`, which is bf16."""
    left, left_scale = _scaled(rows.flatten(0, -2))
    right, right_scale = _scaled(weight)
    multiply = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
    found = multiply(left, right.t(), left_scale, right_scale.t(), out_dtype=rows.dtype)
    return found.view(*rows.shape[:-1], len(weight))


def multiplies_groups(device: torch.device) -> bool:
    """Return whether the device has such products for groups of rows. A CPU multiplies group by group."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) in _GROUPED


def product_of_groups(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """rows (S, k) in bf16 by matrices (groups, k, n), whose group g has the rows [offsets[g - 1], offsets[g]) -> (S, n)
    in bf16. `offsets` (groups,) int32 are on the device."""
    left, left_scales = _scaled(rows)
    right, right_scales = _scaled_matrices(matrices.mT)
    if rows.device.type != "cpu":
        multiply = torch._scaled_grouped_mm  # pyright: ignore[reportPrivateImportUsage]
        scales = left_scales.view(-1), right_scales.flatten(1)
        return multiply(left, right.mT, *scales, offs=offsets, out_dtype=rows.dtype)
    multiply = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
    result = rows.new_empty(len(rows), matrices.shape[2])
    for group, (begin, end) in enumerate(pairwise([0, *offsets.tolist()])):
        if begin < end:
            scales = left_scales[begin:end], right_scales[group].t()
            result[begin:end] = multiply(left[begin:end], right[group].t(), *scales, out_dtype=rows.dtype)
    return result


def _scaled_matrices(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """As `_scaled`, matrices (groups, n, k) in any order in memory, some at a time."""
    groups, rows, inner = matrices.shape
    numbers = torch.empty(matrices.shape, dtype=torch.float8_e4m3fn, device=matrices.device)
    scales = torch.empty(groups, rows, 1, device=matrices.device)
    some = max(1, FP8_AT_ONCE // (rows * inner))
    for begin in range(0, groups, some):
        numbers[begin : begin + some], scales[begin : begin + some] = _scaled(matrices[begin : begin + some])
    return numbers, scales


def _scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (..., k) in bf16 as e4m3, contiguous, and their scales (..., 1) fp32. Scales are powers of two, so
    scaling rounds nothing. A row's largest value is scaled to between 128 and 256."""
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=-1, keepdim=True).float()
    exponent = torch.frexp(largest).exponent.clamp_(min=_LEAST) - _TOP
    scaled = rows * torch.exp2(-exponent.float()).to(rows.dtype)
    return scaled.to(torch.float8_e4m3fn).contiguous(), torch.exp2(exponent.float())
