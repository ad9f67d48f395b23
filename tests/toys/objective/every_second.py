"""A toy objective: the next token at every second position only, so that its loss and its weights are not those of sft.

One file, as trainer/tuning/objective/__init__.py wants it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainer.tuning.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.config import ObjectiveSettings
    from trainer.model.micro_batch import MicroBatch
    from trainer.model.packed import PackedModel
    from trainer.tuning.method import Method

IGNORE = -100


class EverySecond(Objective):
    formats = ("prompt_completion",)
    unit = "targets"
    measures = ("rows",)

    @property
    def identity(self) -> dict[str, Any]:
        return {"name": "every_second"}

    def loss(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        import torch

        labels = batch.labels.clone()
        labels[:, 1::2] = IGNORE
        loss = model.head(model.hidden(batch.input), labels)
        return torch.stack([loss, torch.ones_like(loss)])

    def weight(self, batch: MicroBatch) -> int:
        return int((batch.labels[:, ::2] != IGNORE).sum())


OBJECTIVES: dict[str, Callable[[ObjectiveSettings, Method], Objective]] = {
    "every_second": lambda settings, method: EverySecond()
}
