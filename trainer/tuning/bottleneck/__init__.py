"""Bottleneck adapters after the blocks of each layer (arXiv:1902.00751), and their settings."""

from typing import Literal

from trainer.config.section import Section, setting


class BottleneckSettings(Section):
    """Their sizes and places."""

    reduction: int = setting(
        16,
        about="The base's hidden size divided by the width of a bottleneck layer. The width is rounded down.",
        example=16,
        ge=1,
        le=65536,
    )
    activation: Literal["relu", "gelu", "silu", "tanh"] = setting(
        "relu", about="The function between the two matrices of a bottleneck layer.", example="gelu"
    )
    placement: Literal["houlsby", "pfeiffer"] = setting(
        "houlsby",
        about=("Place of the bottleneck layers. houlsby: after attention and after the MLP. pfeiffer: after the MLP."),
        example="pfeiffer",
    )


SETTINGS = (BottleneckSettings,)
