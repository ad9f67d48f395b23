"""Preferences: of two answers to a prompt the chosen one shall become likelier than the rejected one.

With x the prompt, c and r the chosen and the rejected answer, |y| the number of trained tokens, and s the logistic function,
the loss of a pair is, in nats and averaged over the pairs of the global batch:

    dpo     h = log p(c|x) / q(c|x) - log p(r|x) / q(r|x), where q is the reference, the base without what learns
      sigmoid   -(1 - e) log s(beta h) - e log s(-beta h), e the label smoothing       DPO, arXiv:2305.18290, equation 7
      hinge     max(0, 1 - beta h)                                                     RSO, arXiv:2309.06657, section 3.2
      ipo       (h - 1 / (2 beta))^2                                                   IPO, arXiv:2310.12036, equation 17
    orpo    -m(c) - beta log s(o(c) - o(r)), with the mean m(y) = log p(y|x) / |y| and the log odds
            o(y) = m(y) - log(1 - exp m(y))                                            ORPO, arXiv:2403.07691, equations 6 and 7
    simpo   -log s(beta m(c) - beta m(r) - gamma)                                      SimPO, arXiv:2405.14734, equation 6

The reward of an answer is beta log p(y|x) / q(y|x) in dpo and beta m(y) in the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.config import ObjectiveSettings
from trainer.objective.answers import Answers, read_segments
from trainer.objective.objective import Objective, Survey
from trainer.registry import without_defaults
from trainer.tuning.method import Method

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.data.order.micro_batch import MicroBatch
    from trainer.model.packed import PackedModel

_MEASURES = (
    "reward_chosen",
    "reward_rejected",
    "reward_margin",
    "reward_accuracy",  # the share of pairs whose chosen answer has the higher reward
    "length_chosen",  # trained tokens
    "length_rejected",
)


def read_answers(model: PackedModel, batch: MicroBatch) -> tuple[Answers, Answers]:
    """The chosen and the rejected answers of a row, by one pass through the model."""
    answers, chosen, rejected = read_segments(model, batch), batch.rejected - 1, batch.rejected
    return (
        Answers(answers.log_p[chosen], answers.tokens[chosen]),
        Answers(answers.log_p[rejected], answers.tokens[rejected]),
    )


Sides = tuple[Answers, Answers]
"""The chosen and the rejected answers."""


class Judged(NamedTuple):
    """The losses of some pairs, the rewards of their chosen and of their rejected answers, and one more figure; (pairs,) fp32."""

    losses: Tensor
    rewards: tuple[Tensor, Tensor]
    more: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Kind:
    """One of the objectives: the settings that it reads with their defaults, its formula, and the names of the figures that
    the formula adds. The formula gets an object with these settings, the answers by the model, and where it reads a reference
    the log-probabilities of the chosen and of the rejected answers by it, (2, pairs)."""

    defaults: Mapping[str, Any]
    formula: Callable[[Any, Sides, Tensor | None], Judged]
    more: tuple[str, ...] = ()
    reads_reference: bool = False


def dpo(given: Any, answers: Sides, reference: Tensor | None) -> Judged:
    """The formulas of the module's docstring, as are those of the functions below."""
    from torch.nn.functional import logsigmoid, relu

    assert reference is not None
    chosen, rejected = (mine.log_p - base for mine, base in zip(answers, reference, strict=True))
    margin = chosen - rejected
    match given.loss_type:
        case "sigmoid":
            straight, swapped = logsigmoid(given.beta * margin), logsigmoid(-given.beta * margin)
            losses = -(1 - given.label_smoothing) * straight - given.label_smoothing * swapped
        case "hinge":
            losses = relu(1 - given.beta * margin)
        case _:  # ipo
            losses = (margin - 1 / (2 * given.beta)).square()
    return Judged(losses, (given.beta * chosen, given.beta * rejected), ((chosen + rejected) / 2,))


def orpo(given: Any, answers: Sides, reference: Tensor | None) -> Judged:
    from torch.nn.functional import logsigmoid

    chosen, rejected = (side.mean for side in answers)
    losses = -chosen - given.beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))
    return Judged(losses, (given.beta * chosen, given.beta * rejected), (-chosen,))


def _log_odds(mean: Tensor) -> Tensor:
    """log p / (1 - p) of p = exp(mean)."""
    import torch

    # A probability that rounds to 1 would have infinite odds, and a gradient that is no number.
    mean = mean.clamp(max=-1e-6)
    return mean - torch.log(-torch.expm1(mean))


def simpo(given: Any, answers: Sides, reference: Tensor | None) -> Judged:
    from torch.nn.functional import logsigmoid

    chosen, rejected = (given.beta * side.mean for side in answers)
    return Judged(-logsigmoid(chosen - rejected - given.gamma), (chosen, rejected))


@dataclass(frozen=True)
class Preference:
    """An objective over pairs. The reference is the model with what learns switched off, or stored beforehand."""

    given: ObjectiveSettings  # with the kind's own default where beta is not set
    kind: Kind
    method: Method

    @property
    def formats(self) -> Collection[str]:
        return ("preference",)

    @property
    def unit(self) -> str:
        return "pairs"

    @property
    def settings(self) -> Collection[str]:
        return tuple(self.kind.defaults)

    @property
    def defaults(self) -> Mapping[str, Any]:
        return {"name": "sft", **self.kind.defaults}

    @property
    def survey(self) -> Survey | None:
        return None

    @property
    def reads_reference(self) -> bool:
        return self.kind.reads_reference

    @property
    def measures(self) -> Sequence[str]:
        return (*_MEASURES, *self.kind.more)

    @property
    def identity(self) -> dict[str, Any]:
        return without_defaults({name: getattr(self.given, name) for name in self.defaults}, self.defaults)

    def mismatches(self) -> list[str]:
        wrong, smoothing = [], f"objective.label_smoothing: {self.given.label_smoothing}"
        if self.given.label_smoothing and self.given.loss_type != "sigmoid":
            wrong.append(
                f"{smoothing} has no effect with objective.loss_type: {self.given.loss_type}. Remove it, or set loss_type: sigmoid."
            )
        if self.given.label_smoothing >= 0.5:
            wrong.append(
                f"{smoothing} would have most pairs be the wrong way round. It is below 0.5 with objective.name: {self.given.name}."
            )
        return wrong

    def weight(self, batch: MicroBatch) -> int:
        return len(batch.rejected)

    def reference(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        import torch

        return torch.stack([side.log_p for side in read_answers(model, batch)], dim=1)

    def loss(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        import torch

        reference = batch.reference
        if self.reads_reference and reference is None:
            with torch.no_grad(), self.method.switched_off(model.model):
                reference = self.reference(model, batch)
        answers = read_answers(model, batch)
        sides = None if reference is None else reference.T
        losses, (chosen, rejected), more = self.kind.formula(self.given, answers, sides)
        lengths = (side.tokens for side in answers)
        measures = (chosen, rejected, chosen - rejected, (chosen > rejected).float(), *lengths, *more)
        return torch.stack([losses.sum(), *(measure.detach().sum() for measure in measures)])


KINDS = {
    "dpo": Kind(
        {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0},
        dpo,
        more=("log_ratio",),  # the mean of log p / q over the answers of a pair, in nats an answer
        reads_reference=True,
    ),
    "orpo": Kind({"beta": 0.1}, orpo, more=("nats_chosen",)),  # its next-token loss, in nats a token
    "simpo": Kind({"beta": 2.0, "gamma": 1.0}, simpo),
}


def _make(kind: Kind, given: ObjectiveSettings, method: Method) -> Preference:
    beta = kind.defaults["beta"] if given.beta is None else given.beta
    return Preference(given.model_copy(update={"beta": beta}), kind, method)


OBJECTIVES: dict[str, Callable[[ObjectiveSettings, Method], Objective]] = {
    name: partial(_make, kind) for name, kind in KINDS.items()
}
