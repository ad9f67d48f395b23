"""A reward model (Bradley-Terry): training gives the chosen one of two answers the higher reward.

The reward of an answer is W h, with h the hidden state of the last token of prompt and answer, and W the head, which
has one output. With s the logistic function, the loss of a pair is

    -log s(r(c) - r(r) - margin) + center_rewards (r(c) + r(r))^2

and averaged over the pairs of the global batch (arXiv:2204.05862; the second term arXiv:2312.09244, section 2), as in
TRL's RewardTrainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from trainer.config.objective import Head
from trainer.config.section import Section, part, setting
from trainer.tuning.head import head_of, outputs
from trainer.tuning.objective import Objective, ObjectiveOfSettings
from trainer.tuning.objective.answers import MEASURES_OF_PAIRS, segments_of_tokens, sums_of_pairs

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.config import ObjectiveSettings
    from trainer.model.micro_batch import MicroBatch
    from trainer.model.packed import PackedModel
    from trainer.tuning.method import Method


class RewardSettings(Section):
    """The terms of the loss of a pair."""

    margin: float = setting(
        0.0,
        about="reward: by how much the reward of the chosen answer should exceed that of the rejected answer.",
        example=0.5,
        ge=0,
        le=100,
        unit="reward",
    )
    center_rewards: float = setting(
        0.0,
        about=(
            "reward: weight of an additional loss, the square of the sum of both rewards of a pair. It keeps the mean"
            " of the rewards near 0."
        ),
        example=0.01,
        ge=0,
        le=100,
    )


SETTINGS = (RewardSettings,)
HEADS = {
    "reward": Head(
        "SEQ_CLS", "text-classification", "AutoModelForSequenceClassification", "A reward model", labelled=False
    ),
}


class Reward(ObjectiveOfSettings):
    """The formula of the module's docstring."""

    defaults: Mapping[str, Any] = {"name": "sft", "margin": 0.0, "center_rewards": 0.0}
    formats = ("preference", "preference_pictures")
    unit = "pairs"
    measures = MEASURES_OF_PAIRS

    def __init__(self, given: ObjectiveSettings, method: Method) -> None:
        super().__init__(given)
        head = head_of(method)
        assert head is not None
        self._head = head

    def loss(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        import torch
        from torch.nn.functional import logsigmoid

        from trainer.model.micro_batch import Role

        own = part(self.given, RewardSettings)
        places = last_places(batch.whole, self._head.padding)
        rejected = batch.segments(Role.REJECTED)
        both = torch.cat([places[rejected - 1], places[rejected]])
        rewards, pairs = outputs(model, batch, both)[:, 0], len(rejected)
        chosen, rejected = rewards[:pairs], rewards[pairs:]
        losses = -logsigmoid(chosen - rejected - own.margin) + own.center_rewards * (chosen + rejected).square()
        return sums_of_pairs(losses, chosen, rejected, (), batch)


def last_places(batch: MicroBatch, padding: int | None) -> Tensor:
    """The place that transformers' classifiers read: the last token in each segment that is not `padding`.

    (segments,) int64.
    """
    import torch

    owner = segments_of_tokens(batch)
    numbers = torch.arange(len(owner), device=owner.device)
    counted = numbers if padding is None else torch.where(batch.input.input_ids[0] == padding, 0, numbers)
    return batch.input.cu_seqlens[:-1].long().scatter_reduce(0, owner, counted, "amax")


OBJECTIVES: dict[str, Callable[[ObjectiveSettings, Method], Objective]] = {"reward": Reward}
ABOUT = {"reward": "a score for each answer, learnt from pairs of answers"}
