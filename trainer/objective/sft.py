"""Supervised fine-tuning: the next token's negative log-likelihood, each target token weighing the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.config import ObjectiveSettings
from trainer.objective.objective import Objective
from trainer.tuning.method import Method

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.data.stream import MicroBatch
    from trainer.model.packed import PackedModel


class NextTokens:
    """Mean of -log p over the targets, in nats."""

    settings: Collection[str] = ()
    defaults: Mapping[str, Any] = {"name": "sft"}
    formats: Collection[str] = ("chat", "prompt_completion", "text")
    reads_reference: bool = False
    unit: str = "targets"
    measures: Sequence[str] = ()

    @property
    def identity(self) -> dict[str, Any]:
        return {}

    def mismatches(self) -> list[str]:
        return []

    def loss(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        return model.head(model.hidden(batch), batch.labels)

    def weight(self, batch: MicroBatch) -> int:
        return batch.targets


OBJECTIVES: dict[str, Callable[[ObjectiveSettings, Method], Objective]] = {"sft": lambda settings, method: NextTokens()}
