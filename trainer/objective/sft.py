"""Supervised fine-tuning: the next token's negative log-likelihood, each target token weighing the same."""

from dataclasses import dataclass

from torch import Tensor

from trainer.data.stream import MicroBatch
from trainer.model.packed import PackedModel


@dataclass(frozen=True)
class NextTokens:
    """Mean of -log p over the targets, in nats."""

    def loss(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        return model.head(model.hidden(batch), batch.labels)

    def weight(self, batch: MicroBatch) -> int:
        return batch.targets
