"""Reward models: their head and their settings."""

from trainer.config.objective import Head
from trainer.config.section import Section, setting


class RewardSettings(Section):
    """The terms of the loss of a pair."""

    margin: float = setting(
        0.0,
        about="reward: by how much the chosen answer's reward should exceed the rejected one's.",
        example=0.5,
        ge=0,
        le=100,
        unit="reward",
    )
    center_rewards: float = setting(
        0.0,
        about="reward: weight of the square of the sum of both rewards beside the loss. It keeps their mean at 0.",
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
