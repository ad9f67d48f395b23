"""The bottleneck adapter (arXiv:1902.00751): a small MLP with a residual, on what leaves a block of a decoder layer."""

from typing import Any

import torch
from torch import Tensor, nn

_ACTIVATIONS = {
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


class Bottleneck(nn.Module):
    """`y = x + up(activation(down(x)))`, or x itself while it is not `active`.

    Parameters: down.weight (width, hidden), down.bias (width,), up.weight (hidden, width), up.bias (hidden,). It starts as
    the identity: up and the biases are zero, and down is drawn as LoRA's A is (arXiv:2110.04366, section 4.1, starts it so;
    Houlsby et al. draw both near zero).
    """

    def __init__(self, hidden: int, width: int, activation: str, device: torch.device, dtype: torch.dtype) -> None:
        """`down` is drawn from the CPU's generator, whatever the device."""
        super().__init__()
        self.activation, self.active = _ACTIVATIONS[activation], True
        self.down, self.up = nn.Linear(hidden, width), nn.Linear(width, hidden)  # torch draws weights as LoRA draws A
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.to(device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., hidden) -> (..., hidden)."""
        return x + self.up(self.activation(self.down(x))) if self.active else x


def insert(block: nn.Module, adapter: Bottleneck) -> None:
    """Have `adapter` change what leaves `block`, of several values the first: attention also returns its weights, and some
    mixtures of experts their router's scores.

    The adapter is a module inside the block and is called as one, so ZeRO-3 gathers its parameters like any other's; the
    block's own parameters keep their names.
    """
    block.add_module("adapter", adapter)
    block.register_forward_hook(_adapted)


def _adapted(block: Any, _inputs: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (block.adapter(output[0]), *output[1:])
    return block.adapter(output)
