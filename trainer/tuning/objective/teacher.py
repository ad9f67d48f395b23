"""The settings of a teacher, and which objectives have one. This file loads no torch.

Capstan stores a teacher's log-probabilities of the data, or of sampled answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from trainer.tuning.objective import Objective

if TYPE_CHECKING:
    from trainer.config import ObjectiveSettings


@dataclass(frozen=True)
class Teacher:
    """The teacher called `name`: a run if `is_run`, otherwise a base or the URL of a server.

    A base is quantized as `quant` says, or as the run's base is. For each target the `top_k` likeliest tokens are
    stored, at `temperature`. For sampled answers only the sampled token itself is stored."""

    name: str
    is_run: bool
    quant: str | None
    top_k: int = 0
    temperature: float = 1.0

    @property
    def setting(self) -> str:
        return "objective.teacher_run" if self.is_run else "objective.teacher"

    @property
    def is_server(self) -> bool:
        return self.name.startswith(("http://", "https://"))

    def bytes_a_target(self, vocabulary: int) -> int:
        """Bytes that `trainer.data.dataset.taught` stores for one target, with a vocabulary of so many tokens."""
        k = min(self.top_k, vocabulary)
        return id_bytes(vocabulary) * k + 2 * (k + 1)

    def to_json(self) -> dict[str, Any]:
        """The values that identify a stored teacher of a data set."""
        return {
            "teacher": self.name,
            "run": self.is_run,
            "quant": self.quant,
            "top_k": self.top_k,
            "temperature": self.temperature,
        }


TEACHER = {"teacher": None, "teacher_run": None, "teacher_quant": None}
"""The settings that name a teacher, and their defaults."""


def named_teacher(given: ObjectiveSettings) -> Teacher:
    """The teacher that the settings name. It has no name where `teacher_mismatches` refuses the settings."""
    return Teacher(given.teacher or given.teacher_run or "", given.teacher is None, given.teacher_quant)


def teacher_mismatches(given: ObjectiveSettings) -> Iterator[str]:
    """One sentence for each setting because of which the objective has no teacher, or more than one."""
    if (given.teacher is None) == (given.teacher_run is None):
        both = given.teacher is not None
        yield (
            f"objective.teacher and objective.teacher_run: {'both are' if both else 'none is'} set, and {given.name}"
            f" has one teacher. {'Remove' if both else 'Set'} one of them."
        )
    if given.teacher_run is not None and given.teacher_quant is not None:
        yield (
            "objective.teacher_quant: has no effect with objective.teacher_run, which was trained with its own."
            " Remove it."
        )
    if given.teacher is not None and named_teacher(given).is_server and given.teacher_quant is not None:
        yield "objective.teacher_quant: a server as teacher has its own. Remove it."


def id_bytes(vocabulary: int) -> int:
    """Bytes of a stored token."""
    return 2 if vocabulary <= 2**16 else 4


@runtime_checkable
class LearnsFromTeacher(Objective, Protocol):
    """An objective that reads the teacher's predictions from the columns `teacher_ids` and `teacher_log_p`."""

    @property
    def teacher(self) -> Teacher: ...


def teacher_of(objective: Objective) -> Teacher | None:
    return objective.teacher if isinstance(objective, LearnsFromTeacher) else None
