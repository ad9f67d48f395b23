"""KTO: training makes desired answers likelier than under the reference, and undesired ones less likely.

With x a prompt, y its answer, p the model, q the reference (the base without what learns) and s the logistic function,
the loss of an answer is (arXiv:2402.01306, equation 7, with the weight of its kind as the constant that makes the best
loss 0)

    r(x, y) = log p(y|x) / q(y|x)
    desired     desirable_weight   * (1 - s(beta (r(x, y) - z0)))
    undesired   undesirable_weight * (1 - s(beta (z0 - r(x, y))))
    z0 = max(0, mean of r(x, y') over the step's mismatched answers y'), without a gradient

and is averaged over the answers of the global batch. z0 estimates KL(p || q) as in the paper: each row also holds its
prompt with another row's answer (trainer/data/render/answers.py). Every loss depends on this mean over the whole
global batch. A survey computes it before the first loss, so it does not depend on the ranks, the accumulation or the
packing. An evaluation takes it over all of its data.

The survey runs the reference over both kinds of answers, and the model without dropout over the mismatched ones. It
passes log q(y|x) on to the loss, which runs the model over the labelled answers alone. In tokens that is as much work
as next-token training on the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trainer.config.section import Multiple, Section, part, setting
from trainer.tuning.objective import Objective, ObjectiveOfSettings, Survey
from trainer.tuning.objective.answers import counted_once, read_segments

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.config import ObjectiveSettings
    from trainer.model.micro_batch import MicroBatch
    from trainer.model.packed import PackedModel
    from trainer.tuning.method import Method


class KtoSettings(Section):
    """The weights of the two kinds of answers."""

    desirable_weight: Multiple = setting(1.0, about="kto: weight of the loss of a desired answer.", example=1.33)
    undesirable_weight: Multiple = setting(
        1.0,
        about=(
            "kto: weight of the loss of an undesired answer. desirable_weight times the number of desired answers"
            " should be about equal to undesirable_weight times the number of undesired answers."
        ),
        example=0.5,
    )


SETTINGS = (KtoSettings,)


class Kto(ObjectiveOfSettings):
    """The formulas of the module's docstring. A reward is beta r(x, y)."""

    defaults: Mapping[str, Any] = {"name": "sft", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    formats = ("labelled", "labelled_pictures")
    reads_reference = True
    unit = "answers"
    measures = (
        "reward_desired",  # the mean over the desired answers, as the next over the others
        "reward_undesired",
        "reward_margin",
        "kl",  # z0, in nats an answer
        "log_ratio",  # the mean of r over all answers, in nats an answer
        "length_desired",  # trained tokens
        "length_undesired",
    )

    def __init__(self, given: ObjectiveSettings, method: Method) -> None:
        super().__init__(given)
        self._method, self.survey = method, Survey(4, 0.5, self._survey)

    def _survey(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        """Four sums over the row, then log q of each answer.

        The sums are r of the mismatched answers, their number, and the numbers of desired and of undesired answers.
        """
        import torch

        from trainer.model.micro_batch import Role

        base = batch.column("reference") if "reference" in batch.columns else None
        if base is None:
            with self._method.switched_off(model.model):
                base = self.reference(model, batch)
        behind = batch.segments(Role.MISMATCHED)
        mismatched = read_segments(model, batch.part(Role.MISMATCHED)).log_p[: len(behind)]
        is_desired = batch.column("desired")
        counts = (
            torch.full((), len(mismatched), dtype=base.dtype, device=base.device),
            is_desired.sum().float(),
            (len(is_desired) - is_desired.sum()).float(),
        )
        ratio = (mismatched - base[_owners(batch), 1]).sum()
        return torch.cat([counted_once(torch.stack([ratio, *counts]), batch), base[:, 0]])

    def reference(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        """The labelled answer of each document, then its mismatched one, or 0 if it has none."""
        import torch

        from trainer.model.micro_batch import Role

        log_p, beginnings = read_segments(model, batch).log_p, batch.segments(Role.DOCUMENT)
        mismatched = torch.zeros(len(beginnings), device=log_p.device)
        mismatched[_owners(batch)] = log_p[batch.segments(Role.MISMATCHED)]
        return torch.stack([log_p[beginnings], mismatched], dim=1)

    def loss(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        import torch

        from trainer.model.micro_batch import Role

        assert batch.survey is not None
        ratios, mismatched, desired, undesired = batch.survey[:4]
        answers, is_desired = read_segments(model, batch.part(Role.DOCUMENT)), batch.column("desired")
        ratio = answers.log_p[: len(is_desired)] - batch.survey[4:]
        z0 = (ratios / mismatched.clamp(min=1)).clamp(min=0)
        own = part(self.given, KtoSettings)
        gain = self.beta * (ratio - z0)
        for_desired, for_undesired = own.desirable_weight, own.undesirable_weight
        losses = torch.where(is_desired, for_desired * torch.sigmoid(-gain), for_undesired * torch.sigmoid(gain))

        # The step divides every sum by the number of all answers. Scale the sums so that this gives a mean over a kind.
        total = desired + undesired
        of_desired = is_desired * total / desired.clamp(min=1)
        of_undesired = ~is_desired * total / undesired.clamp(min=1)
        rewards, lengths = self.beta * ratio.detach(), answers.tokens[: len(is_desired)]
        reward_desired, reward_undesired = (rewards * of_desired).sum(), (rewards * of_undesired).sum()
        measures = (
            reward_desired,
            reward_undesired,
            reward_desired - reward_undesired,
            z0 * len(ratio),
            ratio.detach().sum(),
        )
        lengths_of_both = (lengths * of_desired).sum(), (lengths * of_undesired).sum()
        return counted_once(torch.stack([losses.sum(), *measures, *lengths_of_both]), batch)


def _owners(batch: MicroBatch) -> Tensor:
    """The document of each mismatched answer, by its number in the row, (mismatched,) int64."""
    import torch

    from trainer.model.micro_batch import Role

    return torch.searchsorted(batch.segments(Role.DOCUMENT), batch.segments(Role.MISMATCHED), right=True) - 1


OBJECTIVES: dict[str, Callable[[ObjectiveSettings, Method], Objective]] = {"kto": Kto}
ABOUT = {"kto": "to give desired answers and avoid undesired ones (data.format: labelled)"}
