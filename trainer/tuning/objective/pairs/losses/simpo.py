"""SimPO (arXiv:2405.14734, equation 6): -log s(beta m(c) - beta m(r) - gamma), with the mean m(y) = log p(y|x) / |y|.
The reward of an answer is beta m(y)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.config.section import Section, setting
from trainer.tuning.objective.pairs.pair_loss import Judged, PairLoss

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.tuning.objective.pairs.pair_loss import Sides


class SimpoSettings(Section):
    """Its margin."""

    gamma: float = setting(
        1.0,
        about="simpo: margin by which the chosen answer's reward should exceed the rejected one's.",
        example=1.6,
        ge=0,
        le=100,
        unit="reward",
    )


def simpo(given: Any, answers: Sides, reference: Tensor | None) -> Judged:
    from torch.nn.functional import logsigmoid

    chosen, rejected = (given.beta * side.mean for side in answers)
    return Judged(-logsigmoid(chosen - rejected - given.gamma), (chosen, rejected))


PAIR_LOSSES = {"simpo": PairLoss({"beta": 2.0, "gamma": 1.0}, simpo, settings=SimpoSettings)}
ABOUT = {"simpo": "a chosen answer against a rejected one by the mean of their tokens, without a reference"}
