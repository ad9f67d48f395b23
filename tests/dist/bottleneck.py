"""Bottleneck adapters by transformers and PyTorch alone: each block's output is changed where its decoder layer calls
it.
"""

from typing import Any

import torch
from torch import Tensor

from tests.dist.gradients import plain_base, plain_step
from trainer.config import parse_config
from trainer.config.section import part
from trainer.tuning.bottleneck import BottleneckSettings


def plain_first_step(config_text: str, fingerprint: str, destination: str, slip: str = "") -> dict[str, Any]:
    """The first step's gradients; see `gradients.plain_first_step`.

    `slip` is a mistake that must show: residual (the adapter's own is left out), or first (the adapter is before the
    block).
    """
    config = parse_config(config_text)
    model, adapters = plain_base(config), dict[str, Any]()
    tuning, hidden = part(config.tuning, BottleneckSettings), model.config.hidden_size
    width = hidden // tuning.reduction
    shapes = {"down.weight": (width, hidden), "down.bias": (width,), "up.weight": (hidden, width), "up.bias": (hidden,)}
    for number, layer in enumerate(model.model.layers):
        for block in ("self_attn", "mlp") if tuning.placement == "houlsby" else ("mlp",):
            own = {name: torch.zeros(shape).requires_grad_() for name, shape in shapes.items()}
            adapters |= {f"model.layers.{number}.{block}.adapter.{name}": value for name, value in own.items()}
            _put_behind(getattr(layer, block), own, tuning.activation, slip)
    return plain_step(config, fingerprint, model, adapters, destination)


def _put_behind(block: Any, own: dict[str, Tensor], activation: str, slip: str) -> None:
    forward = block.forward

    def adapted(x: Tensor) -> Tensor:
        inner = x @ own["down.weight"].T + own["down.bias"]
        inner = {"relu": torch.relu, "gelu": torch.nn.GELU(), "silu": torch.nn.SiLU(), "tanh": torch.tanh}[activation](
            inner
        )
        change = inner @ own["up.weight"].T + own["up.bias"]
        return change if slip == "residual" else x + change

    def behind(*inputs: Any, **named: Any) -> Any:
        if slip == "first":
            given = named.pop("hidden_states", None)
            x, rest = (inputs[0], inputs[1:]) if given is None else (given, inputs)
            return forward(adapted(x), *rest, **named)
        output = forward(*inputs, **named)
        return (adapted(output[0]), *output[1:]) if isinstance(output, tuple) else adapted(output)

    block.forward = behind
