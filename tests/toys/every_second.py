"""A toy objective: the next token at every second position only, so that its loss and its weights are not those of sft."""

from torch import Tensor

from trainer.data.stream import MicroBatch
from trainer.model.head import IGNORE
from trainer.model.packed import PackedModel


class EverySecond:
    def loss(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        labels = batch.labels.clone()
        labels[:, 1::2] = IGNORE
        return model.head(model.hidden(batch), labels)

    def weight(self, batch: MicroBatch) -> int:
        return int((batch.labels[:, ::2] != IGNORE).sum())
