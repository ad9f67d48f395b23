"""How a causal language model makes logits of its hidden states beside the product with its head, found by trying.

Training calls the body alone and makes the logits itself, a chunk at a time, so it must know what the model's own
forward pass does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Logits:
    """Logits are `factor` / `divisor` times the product z with the head, c; with `softcap` c, c * tanh(that / c)."""

    factor: float
    divisor: float
    softcap: float | None

    def __call__(self, z: Tensor) -> Tensor:
        z = z * self.factor / self.divisor
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap


_NO_PICTURE = 3
"""A token that stands for no picture and no sound, nor for the padding of a row."""


class _HiddenStates(dict[str, Any]):
    """The result of a body, of which only the hidden states are something."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__(last_hidden_state=hidden)
        self._hidden = hidden

    def __getattr__(self, name: str) -> Any:
        return self._hidden if name == "last_hidden_state" else None

    def __getitem__(self, index: Any) -> Any:
        return self._hidden if index in (0, "last_hidden_state") else ()


def probe_logits(model: PreTrainedModel, inner: nn.Module, head: nn.Linear) -> Logits | None:
    """How the forward pass of `model` makes logits of the hidden states that `inner` returns, or None where that is not
    one of the ways of `Logits`.

    `inner` is made to return numbers that are known, and the head to return them as they are.
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
    # A division by most numbers has other last bits than a product with their inverse.
    for logits in (Logits(scale, 1.0, softcap), Logits(1.0, divisor, softcap)):
        if torch.equal(found, logits(values)):
            return logits
    close = Logits(float(f"{scale:.6g}"), 1.0, softcap)
    return close if torch.allclose(found.float(), close(values), rtol=1e-5, atol=1e-6) else None
