"""Products with frozen weights in eight-bit floats (`train.products: fp8`). Both factors become e4m3 numbers, each of
their rows has its own scale, and sums are in fp32.

e4m3 is 1 sign, 4 exponent and 3 mantissa bits, at most 448 (arXiv:2209.05433). `torch._scaled_mm` multiplies such rows.
On GPUs it uses their FP8 units. On CPUs it follows the same rules: this takes longer than a plain product, and shows
what a GPU would learn.
"""

import torch
from torch import Tensor

from trainer.errors import ConfigError

MULTIPLE = 16
"""Both sizes of a weight must be multiples of this for a GPU's FP8 units."""
_TOP = 8  # the largest value is below 2**8, of at most 448
_LEAST = -100  # the exponent of rows of zeros, or nearly
# cuBLAS or CUTLASS multiplies on these. GPUs from 12.0 on (RTX 50, RTX PRO) take only one scale a tensor
# (pytorch/pytorch#192707).
_SINCE, _BEFORE = (8, 9), (12, 0)


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
    return found.view(*rows.shape[:-1], -1)


def _scaled(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows (r, k) in bf16 as e4m3, contiguous, and their scales (r, 1) fp32. Scales are powers of two, so
    scaling rounds nothing. A row's largest value is scaled to between 128 and 256."""
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True).float()
    exponent = torch.frexp(largest).exponent.clamp_(min=_LEAST) - _TOP
    scaled = rows * torch.exp2(-exponent.float()).to(rows.dtype)
    return scaled.to(torch.float8_e4m3fn).contiguous(), torch.exp2(exponent.float())
