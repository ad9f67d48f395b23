"""The log-probabilities of whole answers, shared by the objectives that judge answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.model.micro_batch import MicroBatch
    from trainer.model.packed import PackedModel


@dataclass(frozen=True)
class Answers:
    """Some answers: their log p summed over the trained tokens, in nats, and the number of these; (answers,) fp32."""

    log_p: Tensor
    tokens: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean log p of a token. Every answer of a data set has at least one trained token."""
        return self.log_p / self.tokens


def read_segments(model: PackedModel, batch: MicroBatch) -> Answers:
    """The answers in a row's segments, by one pass through the model. Both values are 0 without trained tokens.

    Ranks that share a row all get the values of all of its answers. `counted_once` makes one of them count."""
    import torch

    nats = model.head(model.hidden(batch.input), batch.labels, batch.places, per_target=True)
    segments, owner = len(batch.lengths), segments_of_targets(batch)
    log_p = torch.zeros(segments, device=nats.device).index_add(0, owner, -nats)
    tokens = torch.zeros(segments, device=nats.device).index_add(0, owner, torch.ones_like(nats))
    return Answers(*model.total(torch.stack([log_p, tokens]), batch.input))


def counted_once(values: Tensor, batch: MicroBatch) -> Tensor:
    """`values` of a whole row on the first of the ranks that share it. The others get 0, with the same gradient."""
    return values if batch.input.first == 0 else values - values.detach()


MEASURES_OF_PAIRS = (
    "reward_chosen",
    "reward_rejected",
    "reward_margin",
    "reward_accuracy",  # the share of pairs whose chosen answer has the higher reward
)


def sums_of_pairs(
    losses: Tensor, chosen: Tensor, rejected: Tensor, more: Iterable[Tensor], batch: MicroBatch
) -> Tensor:
    """The sums of a row of pairs: the loss, the measures of the rewards, and `more`. Each argument is (pairs,)."""
    import torch

    measures = (chosen, rejected, chosen - rejected, (chosen > rejected).float(), *more)
    return counted_once(torch.stack([losses.sum(), *(measure.detach().sum() for measure in measures)]), batch)


def segments_of_targets(batch: MicroBatch) -> Tensor:
    """The number of the segment that each target of a row is in, (targets,) int64."""
    return segments_of_tokens(batch)[batch.input.first + batch.places]


def segments_of_tokens(batch: MicroBatch) -> Tensor:
    """The number of the segment that each token of the whole row is in, (T,) int64."""
    import torch

    sizes = batch.input.cu_seqlens.diff().long()
    numbers = torch.arange(len(sizes), device=sizes.device)
    return torch.repeat_interleave(numbers, sizes, output_size=batch.input.parts * batch.labels.numel())
