"""The settings of the section `objective` that distil alone reads."""

from typing import Literal

from trainer.config.section import Factor, Section, Share, TokenCount, setting


class DistilSettings(Section):
    """The settings of what is stored of a teacher, and of the divergence from it."""

    top_k: TokenCount = setting(
        64,
        about=(
            "distil: likeliest tokens of the teacher that are stored for each target; all others are one outcome, the"
            " tail."
        ),
        example=16,
    )
    divergence: Literal["forward", "reverse"] = setting(
        "forward",
        about=(
            "distil: forward is KL(teacher || student), which covers all that the teacher says. reverse is KL(student"
            " || teacher), which keeps to what it holds likely."
        ),
        example="reverse",
    )
    temperature: Factor = setting(
        1.0,
        about=(
            "distil: divisor of the logits of both before they are compared. The divergence is multiplied by its"
            " square."
        ),
        example=2.0,
    )
    next_tokens: Share = setting(
        0.0,
        about="distil: share of the loss that is the next token's, as in sft; the rest is the divergence.",
        example=0.5,
    )


SETTINGS = (DistilSettings,)
