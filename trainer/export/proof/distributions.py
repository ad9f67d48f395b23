"""How far apart two models' predictions are: the Kullback-Leibler divergence, and the trained tokens'
log-probabilities.

Differences of single logits say little: real models have logits above a hundred, whose last bits in bf16 are worth a
whole nat each and yet hardly move a probability.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.export.proof.rows import ProbeRow


class Distance(NamedTuple):
    """Both are means over the places of all rows, in nats a token.

    `kl`: KL(one || other) of the next token's distributions. `log_prob`: the absolute difference of the log-probability
    of the token that is trained there.
    """

    kl: float
    log_prob: float


def as_shares(outputs: Tensor, row: ProbeRow) -> Tensor:
    """The outputs (P, outputs) of a head as logits of a distribution. Those of classes are logits already. Others get a
    0 beside them: a softmax over an output and 0 is its logistic function."""
    return torch.nn.functional.pad(outputs, (0, 1)) if row.beside_zero else outputs


def distance(one: Sequence[Tensor], other: Sequence[Tensor], rows: Sequence[ProbeRow]) -> Distance:
    """`one` and `other`: for each row the logits (P, V) at its places. Computed in fp64, a row at a time."""
    divergences, differences = list[Tensor](), list[Tensor]()
    for ours, theirs, row in zip(one, other, rows, strict=True):
        log_p, log_q = (logits.double().log_softmax(-1) for logits in (ours, theirs))
        divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        differences.append((log_p - log_q).gather(-1, row.targets[:, None]).abs())
    return Distance(float(torch.cat(divergences).mean()), float(torch.cat(differences).mean()))
