"""How far apart two models' predictions are.

The measures are the Kullback-Leibler divergence, and the trained tokens' log-probabilities. Differences of single
logits say little: real models have logits above a hundred. The last bits of these in bf16 are worth a whole nat each
and yet hardly move a probability.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.export.proof.rows import ProbeRow


class Distance(NamedTuple):
    """The distance of two models. Both values are means over the places of all rows, in nats a token.

    `kl` is KL(one || other) of the next token's distributions. `log_prob` is the absolute difference of the
    log-probability of the token that is trained there.
    """

    kl: float
    log_prob: float


def as_shares(outputs: Tensor, row: ProbeRow) -> Tensor:
    """Return the outputs (P, outputs) of a head as logits of a distribution.

    Outputs of classes are logits already. Other outputs get a 0 beside them: a softmax over an output and 0 is the
    logistic function of the output.
    """
    return torch.nn.functional.pad(outputs, (0, 1)) if row.beside_zero else outputs


def distance(one: Sequence[Tensor], other: Sequence[Tensor], rows: Sequence[ProbeRow]) -> Distance:
    """Return the distance of `one` and `other`: for each row the logits (P, V) at its places.

    It is computed in fp64, a row at a time.
    """
    divergences, differences = list[Tensor](), list[Tensor]()
    for ours, theirs, row in zip(one, other, rows, strict=True):
        log_p, log_q = (logits.double().log_softmax(-1) for logits in (ours, theirs))
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        differences.append((log_p - log_q).gather(-1, row.targets[:, None]).abs())
    return Distance(float(torch.cat(divergences).mean()), float(torch.cat(differences).mean()))
