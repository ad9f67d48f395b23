"""Preferences: training makes the chosen one of two answers likelier than the rejected one.

The objectives over pairs differ in the loss of a pair. Each file here names losses in `PAIR_LOSSES`, and each name is
one that `objective.name` may have. A loss declares its settings itself.

In the formulas x is the prompt, c and r are the chosen and the rejected answer, |y| is the number of trained tokens,
and s the logistic function. A loss is in nats, and averaged over the pairs of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.config.registry import kinds
from trainer.config.section import Section
from trainer.tuning.objective import Objective, ObjectiveOfSettings
from trainer.tuning.objective.answers import MEASURES_OF_PAIRS, Answers, read_segments, sums_of_pairs

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.config import ObjectiveSettings
    from trainer.model.micro_batch import MicroBatch
    from trainer.model.packed import PackedModel
    from trainer.tuning.method import Method

    Sides = tuple[Answers, Answers]
    """The chosen and the rejected answers."""


class Judged(NamedTuple):
    """The losses of some pairs, the rewards of their chosen and rejected answers, and more figures; (pairs,) fp32."""

    losses: Tensor
    rewards: tuple[Tensor, Tensor]
    more: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class PairLoss:
    """One loss of a pair.

    Attributes:
        defaults: the settings of the section `objective` that it reads, and the meaning of each where it is not set.
        formula: gets the section, the model's answers, and the reference's log-probabilities of the chosen and of the
            rejected answers, (2, pairs), if it reads a reference.
        more: the names of the figures that the formula adds.
        reads_reference: whether it compares the model with the untrained base.
        settings: the class of the settings that the loss declares itself.
        mismatches: a sentence for each setting that contradicts another one of the section.
    """

    defaults: Mapping[str, Any]
    formula: Callable[[Any, Sides, Tensor | None], Judged]
    more: tuple[str, ...] = ()
    reads_reference: bool = False
    settings: type[Section] | None = None
    mismatches: Callable[[Any], list[str]] = lambda given: []


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


class Preference(ObjectiveOfSettings):
    """An objective over pairs. The reference is the model with its adapter switched off, or was stored beforehand."""

    formats = ("preference", "preference_pictures")
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


# The files of the losses import this one, so they are read when all that they need is defined.
_LOSSES: dict[str, PairLoss] = kinds("trainer.tuning.objective.pairs", "PAIR_LOSSES")
SETTINGS = tuple(loss.settings for loss in _LOSSES.values() if loss.settings)
OBJECTIVES: dict[str, Callable[[ObjectiveSettings, Method], Objective]] = {
    name: partial(Preference, loss) for name, loss in _LOSSES.items()
}
ABOUT = kinds("trainer.tuning.objective.pairs", "ABOUT")
