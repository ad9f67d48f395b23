"""Distillation: training brings the distribution of each target closer to a teacher's.

The teacher's log-probabilities are stored beside the data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from trainer.config.section import Factor, Section, Share, TokenCount, part, setting
from trainer.tuning.objective import Objective, ObjectiveOfSettings
from trainer.tuning.objective.teacher import TEACHER, Teacher, named_teacher, teacher_mismatches

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.config import ObjectiveSettings
    from trainer.model.micro_batch import MicroBatch
    from trainer.model.packed import PackedModel
    from trainer.tuning.method import Method


class DistilSettings(Section):
    """The settings of what is stored of a teacher, and of the divergence from it."""

    top_k: TokenCount = setting(
        64,
        about=(
            "distil: how many of the teacher's likeliest tokens are stored for each trained token. All other tokens"
            " count as a single outcome, the tail."
        ),
        example=16,
    )
    divergence: Literal["forward", "reverse"] = setting(
        "forward",
        about=(
            "distil: forward is KL(teacher || student): the student learns to cover everything that the teacher finds"
            " likely. reverse is KL(student || teacher): the student avoids everything that the teacher finds"
            " unlikely."
        ),
        example="reverse",
    )
    temperature: Factor = setting(
        1.0,
        about=(
            "distil: the logits of both models are divided by the temperature before they are compared, and the"
            " divergence is multiplied by the square of the temperature."
        ),
        example=2.0,
    )
    next_tokens: Share = setting(
        0.0,
        about="distil: the share of the next-token loss of sft in the loss. The rest is the divergence.",
        example=0.5,
    )


SETTINGS = (DistilSettings,)


class Distil(ObjectiveOfSettings):
    """The loss of `trainer.model.divergence.Distillation`.

    An evaluation computes the likelihood of the next tokens, as with sft, so held-out data need no teacher."""

    defaults: Mapping[str, Any] = {
        "name": "sft",
        **TEACHER,
        "top_k": 64,
        "divergence": "forward",
        "temperature": 1.0,
        "next_tokens": 0.0,
    }
    formats = ("chat", "prompt_completion", "text", "segments")
    unit = "targets"

    @property
    def _own(self) -> DistilSettings:
        return part(self.given, DistilSettings)

    @property
    def teacher(self) -> Teacher:
        return replace(named_teacher(self.given), top_k=self._own.top_k, temperature=self._own.temperature)

    def mismatches(self) -> list[str]:
        wrong = list(teacher_mismatches(self.given))
        if self.teacher.is_server and self._own.temperature != 1:
            wrong.append(
                "objective.temperature: a server as teacher has its own, and says its probabilities at 1. Remove it."
            )
        return wrong

    def loss(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        from trainer.model.divergence import Distillation, Taught

        distillation = None
        if model.head.training:
            given = self._own
            taught = Taught(batch.column("teacher_ids"), batch.column("teacher_log_p"))
            distillation = Distillation(taught, given.divergence == "reverse", given.temperature, given.next_tokens)
        return model.head(model.hidden(batch.input), batch.labels, batch.places, distillation=distillation)


OBJECTIVES: dict[str, Callable[[ObjectiveSettings, Method], Objective]] = {
    "distil": lambda given, _method: Distil(given)
}
ABOUT = {"distil": "the probabilities of a stored teacher for each trained token"}
