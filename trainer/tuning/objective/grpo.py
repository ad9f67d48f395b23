"""GRPO: training makes an answer likelier if it is better than others to the same prompt, and less likely if worse.

With r the ratio of the model's probability of a token to the sampler's, and A the advantage of its answer, the loss of
a token is

    clipped     - min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)      arXiv:2402.03300, equation 3
    truncated   - min(r, 1 + clip_high) A log p, without the gradient of the ratio      arXiv:2506.13585, equation 4
    + beta (q / p - log(q / p) - 1), with q the base without what learns (the same equation's last term)

The sampler may be another program (vLLM) with other kernels, and its adapter may be some updates older. So r is the
importance ratio against the probability at which the token was sampled. With `ratio_of: answer` it is the geometric
mean over the answer (GSPO, arXiv:2507.18071, equation 7). `mean_over` and `advantage` offer the forms of GRPO, DAPO
(arXiv:2503.14476) and Dr. GRPO (arXiv:2503.20783). There is no critic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from trainer.config.section import Multiple, Section, part, setting
from trainer.tuning.objective import Objective, ObjectiveOfSettings
from trainer.tuning.objective.answers import segments_of_targets
from trainer.tuning.objective.teacher import TEACHER, Teacher, named_teacher, teacher_mismatches

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from trainer.config import ObjectiveSettings
    from trainer.model.micro_batch import MicroBatch
    from trainer.model.packed import PackedModel
    from trainer.tuning.method import Method


class GrpoSettings(Section):
    """The form of the loss."""

    ratio: Literal["clipped", "truncated"] = setting(
        "clipped",
        about=(
            "grpo and opd: how the loss uses the ratio of the model's probability to the sampler's. clipped: the"
            " ratio is clipped to [1 - clip_low, 1 + clip_high], as in PPO. truncated: the ratio is a weight without"
            " a gradient, at most 1 + clip_high, so that every token keeps a gradient (CISPO, truncated importance"
            " sampling)."
        ),
        example="truncated",
    )
    ratio_of: Literal["token", "answer"] = setting(
        "token",
        about=(
            "grpo: whose ratio the loss uses. token: each token's own ratio. answer: the geometric mean of the ratios"
            " of the whole answer (GSPO, with clip_low: 3.0e-4 and clip_high: 4.0e-4)."
        ),
        example="answer",
    )
    clip_low: float = setting(
        0.2,
        about="grpo and opd with ratio: clipped: how far below 1 a ratio may be before it is clipped.",
        example=0.1,
        gt=0,
        lt=1,
    )
    clip_high: Multiple = setting(
        0.2, about=("grpo and opd: how far above 1 a ratio may be before it is clipped or truncated."), example=0.28
    )
    mean_over: Literal["answers", "tokens", "constant"] = setting(
        "answers",
        about=(
            "grpo and opd: how the loss is averaged. answers: the mean over the tokens of each answer, then over the"
            " answers. tokens: the mean over all tokens (DAPO). constant: the sum over the tokens of each answer"
            " divided by longest_answer, then the mean over answers (Dr. GRPO)."
        ),
        example="constant",
    )
    longest_answer: int = setting(
        256,
        about="grpo and opd with mean_over: constant: the number of tokens by which each answer's sum is divided.",
        example=1024,
        ge=1,
        unit="tokens",
    )
    advantage: Literal["standardised", "centred"] = setting(
        "standardised",
        about=(
            "grpo: an answer's reward minus the mean over its prompt's answers. standardised divides it by their"
            " standard deviation, centred does not (Dr. GRPO)."
        ),
        example="centred",
    )


SETTINGS = (GrpoSettings,)


_LEAST_SPREAD = 1e-4  # as TRL has it


class Grpo(ObjectiveOfSettings):
    """The loss of the module's docstring, over the answers in a row.

    An evaluation computes the likelihood of the rows' own answers, so it needs no rollouts.
    """

    defaults: Mapping[str, Any] = {
        "name": "sft",
        "beta": 0.0,
        "ratio": "clipped",
        "ratio_of": "token",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "mean_over": "answers",
        "longest_answer": 256,
        "advantage": "standardised",
    }
    formats = ("chat", "prompt_completion")
    measures = (
        "ratio",  # the mean over the tokens, as of the next ones
        "log_ratio",  # its absolute value, in nats
        "clipped",  # the share without a gradient, or with a truncated weight
        "entropy",  # by the sampler's log p of what it drew, in nats a token
        "kl",  # from the base, in nats a token; 0 without beta
    )
    sums: int = 6

    def __init__(self, given: ObjectiveSettings, method: Method) -> None:
        super().__init__(given)
        self._own, self._method = part(self.given, GrpoSettings), method
        self.unit = "targets" if self._own.mean_over == "tokens" else "answers"

    def mismatches(self) -> list[str]:
        given, wrong = self._own, list[str]()
        if given.mean_over != "constant" and given.longest_answer != self.defaults["longest_answer"]:
            wrong.append(
                f"objective.longest_answer: has no effect with objective.mean_over: {given.mean_over}. Remove it."
            )
        if given.ratio == "truncated" and given.clip_low != self.defaults["clip_low"]:
            wrong.append("objective.clip_low: has no effect with objective.ratio: truncated. Remove it.")
        if self.beta and self._method.trains_base:
            wrong.append("objective.beta: there is no base to compare with where the base itself learns. Set it to 0.")
        return wrong

    @property
    def judge(self) -> Teacher | None:
        return None

    def advantages(self, rewards: NDArray[Any], gaps: Sequence[Sequence[float]] | None) -> Sequence[Any]:
        import numpy as np

        centred = rewards - rewards.mean(1, keepdims=True)
        if self._own.advantage == "standardised":
            centred = centred / (np.std(rewards, axis=1, ddof=1, keepdims=True) + _LEAST_SPREAD)
        return centred.reshape(-1).tolist()

    def loss(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        import torch

        base = None
        if "sampled" in batch.columns and self.beta:
            with torch.no_grad(), self._method.switched_off(model.model):
                base = self._log_p(model, batch)
        log_p = self._log_p(model, batch)
        if "sampled" not in batch.columns:
            return torch.cat([-log_p.sum()[None], log_p.new_zeros(self.sums)])
        sampled, advantage = batch.column("sampled").unbind(1)
        owner, ones = segments_of_targets(batch), torch.ones_like(log_p)
        empty = torch.zeros(len(batch.lengths), device=log_p.device)
        length = empty.index_add(0, owner, ones.detach())[owner]  # of the answer that each token is in
        gap = log_p - sampled
        if self._own.ratio_of == "answer":
            gap = empty.index_add(0, owner, gap)[owner] / length
        losses, clipped = self._policy(log_p, gap, advantage)
        kl = torch.zeros_like(log_p)
        if base is not None:
            kl = (base - log_p).exp() - (base - log_p) - 1
            losses = losses + self.beta * kl
        share = {"answers": length, "tokens": ones, "constant": ones * self._own.longest_answer}[self._own.mean_over]
        measures = (ones, gap.exp(), gap.abs(), clipped.float(), -sampled, kl)
        return torch.stack([(losses / share).sum(), *(measure.detach().sum() for measure in measures)])

    def _policy(self, log_p: Tensor, gap: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """The loss without the KL term, and whether the ratio was clipped or truncated; (targets,) each.

        `gap` is the log of the ratio.
        """
        import torch

        low, high, ratio = 1 - self._own.clip_low, 1 + self._own.clip_high, gap.exp()
        if self._own.ratio == "truncated":
            return -ratio.detach().clamp(max=high) * advantage * log_p, ratio > high
        losses = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
        return losses, ((ratio > high) & (advantage > 0)) | ((ratio < low) & (advantage < 0))

    def _log_p(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        return -model.head(model.hidden(batch.input), batch.labels, batch.places, per_target=True)

    def summary(self, means: Sequence[float]) -> Sequence[float]:
        tokens, *others = means
        return [value / tokens if tokens else 0.0 for value in others]


class Opd(Grpo):
    """On-policy distillation: training makes the answers that the model samples as likely as a teacher finds them.

    The loss is the reverse divergence KL(model || teacher) = E[log p - log t] over answers that the model itself
    samples (Agarwal et al., arXiv:2306.13649; Gu et al., arXiv:2306.08543). Its gradient is that of GRPO's loss if each
    token has the advantage log t - log p, where log p is the sampler's. The teacher is a server, which gives its
    log-probabilities before the answers are committed, or it is sharded over ranks of its own (`capstan teach`), which
    give them afterwards. The reward is only measured.
    """

    settings = (*TEACHER, "ratio", "clip_low", "clip_high", "mean_over", "longest_answer")
    defaults: Mapping[str, Any] = {**TEACHER, **Grpo.defaults}

    @property
    def judge(self) -> Teacher | None:
        return named_teacher(self.given)

    def mismatches(self) -> list[str]:
        return [*super().mismatches(), *teacher_mismatches(self.given)]

    def advantages(self, rewards: NDArray[Any], gaps: Sequence[Sequence[float]] | None) -> Sequence[Any]:
        return [0.0] * rewards.size if gaps is None else gaps


OBJECTIVES: dict[str, Callable[[ObjectiveSettings, Method], Objective]] = {"grpo": Grpo, "opd": Opd}
ABOUT = {
    "grpo": "to give answers with higher rewards, from sampled answers",
    "opd": "the probabilities of a teacher for sampled answers",
}
