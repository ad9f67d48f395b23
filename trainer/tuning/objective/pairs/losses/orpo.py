"""ORPO (arXiv:2403.07691, equations 6 and 7): -m(c) - beta log s(o(c) - o(r)), with the mean m(y) = log p(y|x) / |y|
and the log odds o(y) = m(y) - log(1 - exp m(y)). The reward of an answer is beta m(y)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.tuning.objective.pairs.pair_loss import Judged, PairLoss

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.tuning.objective.pairs.pair_loss import Sides


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


PAIR_LOSSES = {
    "orpo": PairLoss({"beta": 0.1}, orpo, more=("nats_chosen",)),  # its next-token loss, in nats a token
}
ABOUT = {"orpo": "the next token, and the odds of a chosen answer against a rejected one"}
