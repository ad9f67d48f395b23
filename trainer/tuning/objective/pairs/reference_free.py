"""Losses that judge an answer by the mean of its tokens, m(y) = log p(y|x) / |y|, without a reference:

    orpo    -m(c) - beta log s(o(c) - o(r)), o(y) = m(y) - log(1 - exp m(y))    ORPO, arXiv:2403.07691, equations 6, 7
    simpo   -log s(beta m(c) - beta m(r) - gamma)                               SimPO, arXiv:2405.14734, equation 6

o are the log odds. The reward of an answer is beta m(y).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.config.section import Section, setting
from trainer.tuning.objective.pairs import Judged, PairLoss

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.tuning.objective.pairs import Sides


def orpo(given: Any, answers: Sides, reference: Tensor | None) -> Judged:
    from torch.nn.functional import logsigmoid

    chosen, rejected = (side.mean for side in answers)
    losses = -chosen - given.beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    return Judged(losses, (given.beta * chosen, given.beta * rejected), (-chosen,))


def _log_odds(mean: Tensor) -> Tensor:
    """log p / (1 - p) of p = exp(mean)."""
    import torch

    # A probability that rounds to 1 would have infinite odds, and a gradient that is no number.
    mean = mean.clamp(max=-1e-6)
    return mean - torch.log(-torch.expm1(mean))


class SimpoSettings(Section):
    """Its margin."""

    gamma: float = setting(
        1.0,
        about="simpo: by how much the chosen answer's reward should exceed the rejected answer's reward.",
        example=1.6,
        ge=0,
        le=100,
        unit="reward",
    )


def simpo(given: Any, answers: Sides, reference: Tensor | None) -> Judged:
    from torch.nn.functional import logsigmoid

    chosen, rejected = (given.beta * side.mean for side in answers)
    return Judged(-logsigmoid(chosen - rejected - given.gamma), (chosen, rejected))


PAIR_LOSSES = {
    "orpo": PairLoss({"beta": 0.1}, orpo, more=("nats_chosen",)),  # its next-token loss, in nats a token
    "simpo": PairLoss({"beta": 2.0, "gamma": 1.0}, simpo, settings=SimpoSettings),
}
ABOUT = {
    "orpo": "the next token of chosen answers, and to prefer them over rejected ones",
    "simpo": (
        "to prefer chosen answers over rejected ones by the mean log-probability of their tokens, without a reference"
    ),
}
