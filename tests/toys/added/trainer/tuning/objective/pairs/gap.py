"""A toy objective over pairs, with a setting of its own: the square of what the mean log-probabilities lack of a
gap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.config.section import Section, setting
from trainer.tuning.objective.pairs import Judged, PairLoss

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.tuning.objective.pairs import Sides


class GapSettings(Section):
    """Its gap."""

    gap: float = setting(1.0, about="gap: how much likelier a chosen token should be.", example=2.0, ge=0, unit="nats")


def gap(given: Any, answers: Sides, reference: Tensor | None) -> Judged:
    chosen, rejected = (side.mean for side in answers)
    return Judged((given.gap - (chosen - rejected)) ** 2, (chosen, rejected))


PAIR_LOSSES = {"gap": PairLoss({"gap": 1.0}, gap, settings=GapSettings)}
