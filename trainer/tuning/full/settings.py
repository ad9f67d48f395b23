"""The settings of the section `tuning` that full fine-tuning alone reads."""

from typing import Literal

from trainer.config.section import Section, setting


class FullSettings(Section):
    """The parameters that learn."""

    train: Literal["all"] | list[str] = setting(
        "all",
        about="Which parameters of the base learn with method full: all, or patterns of their whole names, where * is any "
        "text (last layers, norms, biases).",
        example=["model.layers.31.*", "*norm.weight"],
    )


SETTINGS = (FullSettings,)
