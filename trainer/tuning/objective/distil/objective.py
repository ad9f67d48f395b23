"""Distillation: each target's distribution shall become that of a teacher, whose log-probabilities are stored beside the data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from trainer.config import ObjectiveSettings
from trainer.config.registry import without_defaults
from trainer.config.section import part
from trainer.tuning.method import Method
from trainer.tuning.objective.distil.settings import DistilSettings
from trainer.tuning.objective.objective import Objective, Survey
from trainer.tuning.objective.teacher import Teacher, named_teacher, teacher_mismatches

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.model.micro_batch import MicroBatch
    from trainer.model.packed import PackedModel

_TEACHER = {"teacher": None, "teacher_run": None, "teacher_quant": None}
_DEFAULTS = {
    "top_k": 64,
    "divergence": "forward",
    "temperature": 1.0,
    "next_tokens": 0.0,
}


class Distil:
    """The loss of `trainer.model.divergence.Distillation`. An evaluation is the likelihood of the next tokens, as with sft, so
    held-out data need no teacher."""

    settings: Collection[str] = (*_TEACHER, *_DEFAULTS)
    defaults: Mapping[str, Any] = {"name": "sft", **_TEACHER, **_DEFAULTS}
    formats: Collection[str] = ("chat", "prompt_completion", "text", "segments")
    reads_reference: bool = False
    survey: Survey | None = None
    unit: str = "targets"
    measures: Sequence[str] = ()

    def __init__(self, given: ObjectiveSettings, method: Method) -> None:
        self._given, self._teacher = part(given, DistilSettings), {name: getattr(given, name) for name in _TEACHER}

    @property
    def teacher(self) -> Teacher:
        return replace(
            named_teacher(*self._teacher.values()), top_k=self._given.top_k, temperature=self._given.temperature
        )

    @property
    def identity(self) -> dict[str, Any]:
        return without_defaults(
            {"name": "distil", **self._teacher, **{name: getattr(self._given, name) for name in _DEFAULTS}},
            self.defaults,
        )

    def mismatches(self) -> list[str]:
        wrong = list(teacher_mismatches("distil", *self._teacher.values()))
        if self.teacher.is_server and self._given.temperature != 1:
            wrong.append(
                "objective.temperature: a server as teacher has its own, and says its probabilities at 1. Remove it."
            )
        return wrong

    def loss(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        from trainer.model.divergence import Distillation

        distillation = None
        if model.head.training:
            assert batch.taught is not None
            given = self._given
            distillation = Distillation(
                batch.taught, given.divergence == "reverse", given.temperature, given.next_tokens
            )
        return model.head(model.hidden(batch), batch.labels, batch.places, distillation=distillation)

    def reference(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        raise AssertionError("a teacher is no reference")

    def weight(self, batch: MicroBatch) -> int:
        return batch.targets


OBJECTIVES: dict[str, Callable[[ObjectiveSettings, Method], Objective]] = {"distil": Distil}
