"""Full fine-tuning, and its settings."""

from typing import Literal

from pydantic import field_validator

from trainer.config.patterns import check_patterns
from trainer.config.section import Section, setting


class FullSettings(Section):
    """The parameters that learn."""

    train: Literal["all"] | list[str] = setting(
        "all",
        about=(
            "Which parameters of the base learn with method full: all, or patterns of their whole names, where * is"
            " any text (last layers, norms, biases), or re: and a regular expression for whole names."
        ),
        example=["model.layers.31.*", "*norm.weight"],
    )

    @field_validator("train")
    @classmethod
    def _expressions_of_train(cls, train: str | list[str]) -> str | list[str]:
        check_patterns("tuning.train", train)
        return train


SETTINGS = (FullSettings,)
