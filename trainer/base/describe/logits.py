"""Finds by trial how a causal language model scales and caps the product of its hidden states and its head.

Training calls only the body and computes the logits itself, one chunk at a time, so it must do the same as the model's
own forward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Logits:
    """Logits are y = `factor` / `divisor` * z, with z the product with the head; with `softcap` c, c * tanh(y / c)."""

    factor: float
    divisor: float
    softcap: float | None

    def __call__(self, z: Tensor) -> Tensor:
        z = z * self.factor / self.divisor
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap


_NO_PICTURE = 3
"""A token that stands for no picture and no sound, nor for the padding of a row."""


class _HiddenStates(dict[str, Any]):
    """The result of a body, in which every field except the hidden states is empty."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__(last_hidden_state=hidden)
        self._hidden = hidden

    def __getattr__(self, name: str) -> Any:
        return self._hidden if name == "last_hidden_state" else None

    def __getitem__(self, index: Any) -> Any:
        return self._hidden if index in (0, "last_hidden_state") else ()


def probe_logits(model: PreTrainedModel, inner: nn.Module, head: nn.Linear) -> Logits | None:
    """How the forward pass of `model` computes logits from the hidden states that `inner` returns.

    None if `Logits` cannot express it. For the trial `inner` returns known numbers, and the head returns its input.
    """
    forwards = inner.forward, head.forward

    def through(values: Tensor) -> Tensor:
        inner.forward = lambda *_given, **_named: _HiddenStates(values)
        return model(input_ids=torch.full(values.shape[:2], _NO_PICTURE), use_cache=False).logits

    head.forward = lambda input: input
    try:
        with torch.no_grad():
            return _fitted(through, head.in_features)
    finally:
        inner.forward, head.forward = forwards


def _fitted(through: Callable[[Tensor], Tensor], width: int) -> Logits | None:
    def at(value: float) -> float:
        return through(torch.full((1, 1, width), value, dtype=torch.float64))[0, 0, 0].item()

    tiny, huge = 2.0**-30, 2.0**60
    scale, end = at(tiny) / tiny, at(huge)
    if not scale:
        return None
    softcap = None if abs(end) > 2.0**30 else end
    divisor = float(f"{1 / scale:.12g}")
    values = torch.linspace(-20, 20, 2 * width).view(1, 2, width)
    found = through(values)
    # Dividing by a number usually differs in the last bits from multiplying by its inverse, so try both.
    for logits in (Logits(scale, 1.0, softcap), Logits(1.0, divisor, softcap)):
        if torch.equal(found, logits(values)):
            return logits
    close = Logits(float(f"{scale:.6g}"), 1.0, softcap)
    return close if torch.allclose(found.float(), close(values), rtol=1e-5, atol=1e-6) else None
