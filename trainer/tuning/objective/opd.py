"""On-policy distillation: what the model samples becomes as likely as a teacher has it.

The reverse divergence KL(model || teacher) = E[log p - log t], over answers that the model itself samples, has the gradient of GRPO's loss with the
advantage log t - log p of each token (Agarwal et al., arXiv:2306.13649; Gu et al., arXiv:2306.08543), where log p is the sampler's and the ratio of the
two models is bounded as there. The teacher is a server that gives its log-probabilities of the tokens; the reward is only measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainer.config import ObjectiveSettings
from trainer.config.section import part
from trainer.tuning.method import Method
from trainer.tuning.objective.distil.settings import DistilSettings
from trainer.tuning.objective.grpo.objective import DEFAULTS, Grpo
from trainer.tuning.objective.objective import Objective

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SHARED = ("ratio", "clip_low", "clip_high", "mean_over", "longest_answer")


class Opd(Grpo):
    settings: Collection[str] = ("teacher", *_SHARED)
    defaults: Mapping[str, Any] = {"name": "sft", "teacher": None, **DEFAULTS}

    def __init__(self, given: ObjectiveSettings, method: Method) -> None:
        super().__init__(given, method)
        self._teacher = part(given, DistilSettings).teacher

    @property
    def judge(self) -> str | None:
        return self._teacher

    @property
    def identity(self) -> dict[str, Any]:
        return {**super().identity, "name": "opd", "teacher": self._teacher}

    def mismatches(self) -> list[str]:
        wrong = super().mismatches()
        if not (self._teacher or "").startswith(("http://", "https://")):
            wrong.append(
                "objective.teacher: opd asks a server for its log-probabilities of each answer. Give the URL of a vLLM, with the model's name behind a "
                "#. Example: http://gpu-3:8000#big."
            )
        return wrong

    def advantages(self, rewards: NDArray[Any], gaps: Sequence[Sequence[float]] | None) -> Sequence[Any]:
        assert gaps is not None
        return gaps


OBJECTIVES: dict[str, Callable[[ObjectiveSettings, Method], Objective]] = {"opd": Opd}
