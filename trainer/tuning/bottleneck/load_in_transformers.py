"""Puts an exported bottleneck adapter (arXiv:1902.00751) on its base in transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

ACTIVATIONS = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "tanh": torch.tanh}
PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")


class Adapter(nn.Module):
    def __init__(self, hidden: int, width: int, activation: str) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(hidden, width), nn.Linear(width, hidden)
        self.activation, self.active = ACTIVATIONS[activation], True

    def forward(self, x: Tensor) -> Tensor:
        change = self.up(self.activation(self.down(x.to(self.down.weight.dtype))))
        return x + change.to(x.dtype) if self.active else x


def adapt(block: Any, _inputs: Any, output: Any) -> Any:
    return (block.adapter(output[0]), *output[1:]) if isinstance(output, tuple) else block.adapter(output)


def load_bottleneck(model: nn.Module, folder: str | Path) -> list[Adapter]:
    """Change `model` in place. While no adapter of the list is `active`, it is the base again."""
    settings = json.loads(Path(folder, "bottleneck.json").read_text())
    weights, adapters = load_file(Path(folder, "bottleneck.safetensors")), list[Adapter]()
    for path in settings["blocks"]:
        block, values = model.get_submodule(path), {part: weights.pop(f"{path}.adapter.{part}") for part in PARTS}
        width, hidden = values["down.weight"].shape
        adapter = Adapter(hidden, width, settings["activation"])
        adapter.load_state_dict(values, assign=True)
        adapters.append(adapter.to(next(block.parameters()).device))
        block.add_module("adapter", adapter)
        block.register_forward_hook(adapt)
    if weights:
        raise ValueError(f"these weights belong to no block of bottleneck.json: {sorted(weights)}")
    return adapters
