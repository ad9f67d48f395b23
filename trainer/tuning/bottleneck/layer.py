"""The bottleneck adapter (arXiv:1902.00751) as it is trained: the module that users are given, with a start."""

import torch
from torch import nn

from trainer.tuning.bottleneck.load_in_transformers import Adapter, adapt


class Bottleneck(Adapter):
    """`y = x + up(activation(down(x)))`, or x itself while it is not `active`.

    Parameters: down.weight (width, hidden), down.bias (width,), up.weight (hidden, width), up.bias (hidden,). It starts
        as the identity: up and the biases are zero, and down is drawn as LoRA's A is (arXiv:2110.04366, section 4.1,
        starts it so; Houlsby et al. draw both near zero).
    """

    def __init__(self, hidden: int, width: int, activation: str, device: torch.device, dtype: torch.dtype) -> None:
        """`down` is drawn from the CPU's generator, whatever the device."""
        super().__init__(hidden, width, activation)  # torch draws weights as LoRA draws A
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.to(device, dtype)


def insert(block: nn.Module, adapter: Bottleneck) -> None:
    """Make `adapter` change the output of `block`.

    It changes the first of several outputs: attention also returns its weights, and some mixtures of experts return
    their router's scores.

    The adapter is a module inside the block and is called as one, so ZeRO-3 gathers its parameters like any other's;
    the block's own parameters keep their names.
    """
    block.add_module("adapter", adapter)
    block.register_forward_hook(adapt)
