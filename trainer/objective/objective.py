"""The interface of an objective: losses, which the engine sums, and weights, by which the loop divides the sum."""

from typing import Protocol

from torch import Tensor

from trainer.data.stream import MicroBatch
from trainer.model.packed import PackedModel


class Objective(Protocol):
    """Minimised is the sum of `loss` over the sum of `weight`, both over all rows of the global batch."""

    def loss(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        """The summed loss of one packed row on the model's device, () fp32 with its graph. It calls the model once or
        more, but always in one call of this function: ZeRO-3's trace of what is gathered begins and ends with it."""
        ...

    def weight(self, batch: MicroBatch) -> int:
        """How much the row counts in the mean; 0 for a row of padding. Known without the model."""
        ...
