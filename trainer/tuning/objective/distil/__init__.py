"""Distillation from a stored teacher, and its settings."""

from typing import Literal

from trainer.config.section import Factor, Section, Share, TokenCount, setting


class DistilSettings(Section):
    """The settings of what is stored of a teacher, and of the divergence from it."""

    top_k: TokenCount = setting(
        64,
        about=(
            "distil: how many of the teacher's likeliest tokens are stored for each trained token. All others are one"
            " outcome, the tail."
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
            "distil: divides the logits of both models before they are compared. The divergence is multiplied by its"
            " square."
        ),
        example=2.0,
    )
    next_tokens: Share = setting(
        0.0,
        about="distil: share of the loss that comes from the next token, as in sft. The rest is the divergence.",
        example=0.5,
    )


SETTINGS = (DistilSettings,)
