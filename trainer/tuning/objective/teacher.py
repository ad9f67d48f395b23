"""A teacher whose log-probabilities are stored beside the data: its settings, and which objectives have one. Without torch."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from trainer.tuning.objective.objective import Objective


@dataclass(frozen=True)
class Teacher:
    """The teacher called `name`: a run where `is_run`, else a base that is quantized as `quant`, or as the run's base, or the URL of a server. Of each target the
    `top_k` likeliest tokens are stored, at `temperature`."""

    name: str
    is_run: bool
    quant: str | None
    top_k: int
    temperature: float

    @property
    def setting(self) -> str:
        return "objective.teacher_run" if self.is_run else "objective.teacher"

    @property
    def is_server(self) -> bool:
        return self.name.startswith(("http://", "https://"))

    def bytes_a_target(self, vocabulary: int) -> int:
        """As `trainer.data.dataset.taught` stores them, for a vocabulary of so many tokens."""
        k = min(self.top_k, vocabulary)
        return id_bytes(vocabulary) * k + 2 * (k + 1)

    def to_json(self) -> dict[str, Any]:
        """All that names a stored teacher of a data set."""
        return {
            "teacher": self.name,
            "run": self.is_run,
            "quant": self.quant,
            "top_k": self.top_k,
            "temperature": self.temperature,
        }


def id_bytes(vocabulary: int) -> int:
    """Bytes of a stored token."""
    return 2 if vocabulary <= 2**16 else 4


@runtime_checkable
class LearnsFromTeacher(Objective, Protocol):
    """An objective that finds the teacher's word on each target in `MicroBatch.taught`."""

    @property
    def teacher(self) -> Teacher: ...


def teacher_of(objective: Objective) -> Teacher | None:
    return objective.teacher if isinstance(objective, LearnsFromTeacher) else None
