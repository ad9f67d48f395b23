"""Supervised fine-tuning: the next token's negative log-likelihood, each target token weighing the same."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.config import ObjectiveSettings
from trainer.config.registry import without_defaults
from trainer.config.section import part
from trainer.tuning.method import Method
from trainer.tuning.objective.objective import Objective, Survey
from trainer.tuning.objective.sft.settings import SftSettings

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.model.micro_batch import MicroBatch
    from trainer.model.packed import PackedModel


class NextTokens:
    """Mean of -log p over the targets, in nats; in training with the terms of `trainer.model.head.LossTerms`.

    An evaluation is without them, so that its loss is a likelihood and comparable between runs.
    """

    settings: Collection[str] = ("label_smoothing", "z_loss", "dft")
    defaults: Mapping[str, Any] = {"name": "sft", "label_smoothing": 0.0, "z_loss": 0.0, "dft": False}
    formats: Collection[str] = ("chat", "prompt_completion", "text", "answers")
    reads_reference: bool = False
    survey: Survey | None = None
    unit: str = "targets"
    measures: Sequence[str] = ()

    def __init__(self, label_smoothing: float = 0.0, z_loss: float = 0.0, dft: bool = False) -> None:
        self._label_smoothing, self._z_loss, self._dft = label_smoothing, z_loss, dft

    @property
    def identity(self) -> dict[str, Any]:
        given = {"label_smoothing": self._label_smoothing, "z_loss": self._z_loss, "dft": self._dft}
        return without_defaults(given, self.defaults)

    def mismatches(self) -> list[str]:
        return [
            f"objective.{name}: has no effect with objective.dft: true, which weighs the plain loss of a target. Remove one of them."
            for name, given in (("label_smoothing", self._label_smoothing), ("z_loss", self._z_loss))
            if self._dft and given
        ]

    def loss(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        from trainer.model.head import LossTerms

        if self._dft and model.head.training:
            nats = model.head(model.hidden(batch), batch.labels, batch.places, per_target=True)
            return (nats * (-nats.detach()).exp()).sum()
        terms = LossTerms(self._label_smoothing, self._z_loss) if model.head.training else LossTerms()
        return model.head(model.hidden(batch), batch.labels, batch.places, terms=terms)

    def reference(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        raise AssertionError("next tokens have no reference")

    def weight(self, batch: MicroBatch) -> int:
        return batch.targets


def _next_tokens(label_smoothing: float, own: SftSettings) -> NextTokens:
    return NextTokens(label_smoothing, own.z_loss, own.dft)


OBJECTIVES: dict[str, Callable[[ObjectiveSettings, Method], Objective]] = {
    "sft": lambda given, method: _next_tokens(given.label_smoothing, part(given, SftSettings))
}
