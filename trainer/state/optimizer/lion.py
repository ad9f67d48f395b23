"""Lion (arXiv:2302.06675, algorithm 2): the sign of a momentum mixed with the gradient."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.state.optimizer import Flat, Optimizer, Reduce, State

if TYPE_CHECKING:
    from torch import Tensor

_MOMENTUM = "exp_avg"


class Lion:
    """The momentum of each element, 4 bytes."""

    settings: ClassVar[Collection[str]] = ("betas",)

    def states(self, shape: tuple[int, ...]) -> tuple[State, ...]:
        return (State(_MOMENTUM),)

    def step_bytes(self, portion: int, largest: int, on_gpu: bool) -> int:
        """The gradient and the update."""
        return 8 * portion

    def update(self, flat: Flat, gradient: Tensor, settings: Mapping[str, Any], step: int, reduce: Reduce) -> None:
        (mixed, decay), lr, momentum = settings["betas"], settings["lr"], flat.whole[_MOMENTUM]
        update = (momentum * mixed).add_(gradient, alpha=1 - mixed).sign_()
        flat.values.mul_(1 - lr * settings["weight_decay"]).add_(update, alpha=-lr)
        momentum.mul_(decay).add_(gradient, alpha=1 - decay)


OPTIMIZERS: dict[str, Optimizer] = {"lion": Lion()}
ABOUT = {
    "lion": (
        "one momentum, 4 bytes for each element that learns; all elements change by the same amount; use a third of"
        " AdamW's lr"
    )
}
