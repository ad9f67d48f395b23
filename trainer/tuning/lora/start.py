"""The starts of LoRA's two matrices, by their names in `tuning.init`. All of them leave the base unchanged.

PEFT's `init_lora_weights` has the same names.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Generator, Tensor

Draw = Callable[[int, int, int, Generator], tuple[Tensor, Tensor]]
"""rank, inputs, outputs -> A (rank, inputs) and B (outputs, rank), fp32 on the CPU, so that every rank and every
machine has the same.
"""


def _gaussian(rank: int, inputs: int, outputs: int, drawn: Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, inputs, generator=drawn) / rank, torch.zeros(outputs, rank)


def _orthogonal(rank: int, inputs: int, outputs: int, drawn: Generator) -> tuple[Tensor, Tensor]:
    """A takes one half of an orthogonal basis and B the other.

    So B @ A is zero, and both learn from the first step.
    """
    basis, _ = torch.linalg.qr(torch.randn(rank, rank, generator=drawn))
    down, up = (torch.randn(size, rank // 2, generator=drawn) / 10 for size in (inputs, outputs))
    return (down @ basis[0::2]).T.contiguous(), up @ basis[1::2]


STARTS: Mapping[str, Draw] = {"gaussian": _gaussian, "orthogonal": _orthogonal}
