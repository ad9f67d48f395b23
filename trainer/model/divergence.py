"""The divergence of a target's distribution from a stored teacher's, and its gradient, over k + 1 outcomes.

A teacher's k likeliest tokens are k outcomes, and all other tokens together, the tail, are one. With t the teacher's
probabilities, s the student's, T and S those of the tail, all at one temperature:

    forward    sum over the k of t (log t - log s)  +  T (log T - log S)
    reverse    sum over the k of s (log s - log t)  +  S (log S - log T)

With k the whole vocabulary there is no tail, and these are KL(teacher || student) and KL(student || teacher). Their
gradients on a logit, with f the bracket of its outcome in `reverse`, and R the value of `reverse`:

    forward    s - t for one of the k,    s (1 - T / S) for one of the tail
    reverse    s (f - R) for each
"""

from typing import NamedTuple

import torch
from torch import Tensor

# The reverse divergence is infinite if the teacher leaves nothing for the tail, as with nearly the whole vocabulary
# stored.
_SMALLEST_TAIL = -40.0


class Taught(NamedTuple):
    """A teacher's probabilities for some targets: `ids` (targets, k) int64, its likeliest tokens, and `log_p` (targets,
    k + 1) fp32 in nats, those of these tokens followed by the tail's.
    """

    ids: Tensor
    log_p: Tensor

    def part(self, place: slice) -> "Taught":
        return Taught(self.ids[place], self.log_p[place])


class Distillation(NamedTuple):
    """A loss with a teacher: `next_tokens` times -log p of the target, plus the rest of 1 times the divergence at
    `temperature`, multiplied by its square so that gradients keep their size (arXiv:1503.02531, section 2.1).
    """

    taught: Taught
    reverse: bool = False
    temperature: float = 1.0
    next_tokens: float = 0.0

    def part(self, place: slice) -> "Distillation":
        """The same loss for some of the targets."""
        return self._replace(taught=self.taught.part(place))


class TopK(NamedTuple):
    """The request to a teacher: the `k` likeliest of its first `vocabulary` tokens, at `temperature`."""

    k: int
    vocabulary: int
    temperature: float = 1.0


def likeliest(logits: Tensor, asked: TopK) -> Taught:
    """The teacher's likeliest tokens and their probabilities, from its logits (targets, V) fp32."""
    k, vocabulary, temperature = asked
    logits = logits[:, :vocabulary] / temperature
    normalizer = logits.logsumexp(-1, keepdim=True)
    values, ids = logits.topk(k, -1)
    # Not 1 minus the others' sum: the tail of a confident teacher is lost in the rounding of 1.
    tail = logits.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
    return Taught(ids, torch.cat([values, tail], -1) - normalizer)


class Divergence:
    """The divergence of targets with `logits` (n, V) fp32, which are not changed."""

    def __init__(self, logits: Tensor, given: Distillation) -> None:
        self.given = given
        ids, self._log_t = given.taught
        logits = logits / given.temperature
        self._log_s = logits - logits.logsumexp(-1, keepdim=True)
        tail = self._log_s.scatter(-1, ids, float("-inf")).logsumexp(-1, keepdim=True)
        self._outcomes = torch.cat([self._log_s.gather(-1, ids), tail], -1)  # log s of each, (n, k + 1)

    def nats(self) -> Tensor:
        """(n,) fp32, times the square of the temperature."""
        return self._plain() * self.given.temperature**2

    def gradient(self) -> Tensor:
        """d nats / d logits, (n, V) fp32."""
        ids, s = self.given.taught.ids, self._log_s.exp()
        factors = self._reverse_factors() if self.given.reverse else 1 - (self._log_t - self._outcomes).exp()
        # An outcome without probability has no gradient, whatever its factor.
        factors = torch.where(self._outcomes == float("-inf"), 0, factors)
        own = s.gather(-1, ids) * factors[:, :-1]
        if not self.given.reverse:  # the same without a ratio, which would be infinite for a student that is far off
            own = s.gather(-1, ids) - self._log_t[:, :-1].exp()
        return s.mul_(factors[:, -1:]).scatter_(-1, ids, own).mul_(self.given.temperature)

    def _plain(self) -> Tensor:
        if self.given.reverse:
            return self._mean(self._outcomes, self._differences())
        return self._mean(self._log_t, self._log_t - self._outcomes)

    def _reverse_factors(self) -> Tensor:
        return self._differences() - self._plain()[:, None]

    def _differences(self) -> Tensor:
        """log s - log t of each outcome."""
        tail = self._log_t[:, -1:].clamp_min(_SMALLEST_TAIL)
        return self._outcomes - torch.cat([self._log_t[:, :-1], tail], -1)

    @staticmethod
    def _mean(log_p: Tensor, values: Tensor) -> Tensor:
        """The sum of `values`, each times its probability. Values of probability 0 count nothing."""
        p = log_p.exp()
        return torch.where(p > 0, p * values, 0).sum(-1)
