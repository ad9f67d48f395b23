"""AdamW (arXiv:1711.05101) and Adam (arXiv:1412.6980) with fp32 moments, as torch computes them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.state.optimizer import Flat, Optimizer, Reduce, State

if TYPE_CHECKING:
    from torch import Tensor


class AdamW:
    """Both moments of each element, 8 bytes."""

    settings: ClassVar[Collection[str]] = ("betas", "eps")

    def states(self, shape: tuple[int, ...]) -> tuple[State, ...]:
        return State("exp_avg"), State("exp_avg_sq")

    def step_bytes(self, portion: int, largest: int, on_gpu: bool) -> int:
        """The gradient and the root of the second moment, which torch's AdamW holds twice on a CPU."""
        return (8 if on_gpu else 12) * portion

    def update(self, flat: Flat, gradient: Tensor, settings: Mapping[str, Any], step: int, reduce: Reduce) -> None:
        import torch
        from torch.optim.adamw import adamw

        adamw(
            [flat.values],
            [gradient],
            [flat.whole["exp_avg"]],
            [flat.whole["exp_avg_sq"]],
            [],
            [torch.tensor(float(step - 1))],  # torch counts the step itself
            amsgrad=False,
            beta1=settings["betas"][0],
            beta2=settings["betas"][1],
            lr=settings["lr"],
            weight_decay=settings["weight_decay"],
            eps=settings["eps"],
            maximize=False,
        )


class Adam(AdamW):
    """AdamW whose weight decay is added to the gradient, so that the moments contain it too."""

    def step_bytes(self, portion: int, largest: int, on_gpu: bool) -> int:
        """The bytes of AdamW's step, and the gradient with the decay in it."""
        return super().step_bytes(portion, largest, on_gpu) + 4 * portion

    def update(self, flat: Flat, gradient: Tensor, settings: Mapping[str, Any], step: int, reduce: Reduce) -> None:
        decayed = gradient.add(flat.values, alpha=settings["weight_decay"])
        super().update(flat, decayed, {**settings, "weight_decay": 0.0}, step, reduce)


OPTIMIZERS: dict[str, Optimizer] = {"adamw": AdamW(), "adam": Adam()}
ABOUT = {
    "adamw": "AdamW with fp32 moments, 8 bytes for each element that learns",
    "adam": "as adamw, but the weight decay is added to the gradient, as in Adam's paper",
}
