"""The interface of a loss over a pair of answers. It makes the chosen one likelier than the rejected one.

A file of trainer/tuning/objective/pairs/losses names it in `PAIR_LOSSES`, and each name is one that `objective.name`
may have. The configuration reads these files for the settings that they declare, so they import nothing of
trainer.config.

In the formulas x is the prompt, c and r are the chosen and the rejected answer, |y| is the number of trained tokens,
and s the logistic function. A loss is in nats, and averaged over the pairs of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.config.section import Section

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.tuning.objective.answers import Answers

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
