"""Preferences: training makes the chosen one of two answers likelier than the rejected one.

losses/ has the formulas.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from trainer.config import ObjectiveSettings
from trainer.config.registry import kinds
from trainer.tuning.method import Method
from trainer.tuning.objective.answers import MEASURES_OF_PAIRS, Answers, read_segments, sums_of_pairs
from trainer.tuning.objective.objective import Objective, OfSettings
from trainer.tuning.objective.pairs.pair_loss import PairLoss

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.model.micro_batch import MicroBatch
    from trainer.model.packed import PackedModel

_LENGTHS = ("length_chosen", "length_rejected")  # in trained tokens


def read_answers(model: PackedModel, batch: MicroBatch) -> tuple[Answers, Answers]:
    """The chosen and the rejected answers of a row, by one pass through the model."""
    from trainer.model.micro_batch import Role

    answers, rejected = read_segments(model, batch), batch.segments(Role.REJECTED)
    chosen = rejected - 1
    return (
        Answers(answers.log_p[chosen], answers.tokens[chosen]),
        Answers(answers.log_p[rejected], answers.tokens[rejected]),
    )


class Preference(OfSettings):
    """An objective over pairs. The reference is the model with its adapter switched off, or was stored beforehand."""

    formats = ("preference",)
    unit = "pairs"

    def __init__(self, pair_loss: PairLoss, given: ObjectiveSettings, method: Method) -> None:
        self.defaults = {"name": "sft", **pair_loss.defaults}
        self.measures = (*MEASURES_OF_PAIRS, *_LENGTHS, *pair_loss.more)
        self.reads_reference = pair_loss.reads_reference
        self.pair_loss, self.method = pair_loss, method
        super().__init__(given)

    def mismatches(self) -> list[str]:
        return self.pair_loss.mismatches(self.given)

    def reference(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        import torch

        return torch.stack([side.log_p for side in read_answers(model, batch)], dim=1)

    def loss(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        import torch

        reference = batch.column("reference") if "reference" in batch.columns else None
        if self.reads_reference and reference is None:
            with torch.no_grad(), self.method.switched_off(model.model):
                reference = self.reference(model, batch)
        answers = read_answers(model, batch)
        sides = None if reference is None else reference.T
        losses, (chosen, rejected), more = self.pair_loss.formula(self.given, answers, sides)
        lengths = (side.tokens for side in answers)
        return sums_of_pairs(losses, chosen, rejected, (*lengths, *more), batch)


OBJECTIVES: dict[str, Callable[[ObjectiveSettings, Method], Objective]] = {
    name: partial(Preference, loss)
    for name, loss in kinds("trainer.tuning.objective.pairs.losses", "PAIR_LOSSES").items()
}
ABOUT = kinds("trainer.tuning.objective.pairs.losses", "ABOUT")
