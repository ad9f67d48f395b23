"""The settings of the section `objective` that distil alone reads."""

from typing import Literal

from trainer.config.section import Factor, Section, Share, TokenCount, setting


class DistilSettings(Section):
    """Other teachers than objective.teacher, and the divergence from it."""

    teacher_run: str | None = setting(
        None,
        about="distil: a run as the teacher, over its base: its name in run.store, NAME@STEP, or its path or URI.",
        example="big@1200",
    )
    teacher_quant: str | None = setting(
        None,
        about="distil: quant.type of the teacher's base. Default: that of this run. A run has its own.",
        example="nf4",
    )
    top_k: TokenCount = setting(
        64,
        about="distil: likeliest tokens of the teacher that are stored for each target; all others are one outcome, the tail.",
        example=16,
    )
    divergence: Literal["forward", "reverse"] = setting(
        "forward",
        about="distil: forward is KL(teacher || student), which covers all that the teacher says. reverse is KL(student || teacher), which "
        "keeps to what it holds likely.",
        example="reverse",
    )
    temperature: Factor = setting(
        1.0,
        about="distil: divisor of the logits of both before they are compared. The divergence is multiplied by its square.",
        example=2.0,
    )
    next_tokens: Share = setting(
        0.0,
        about="distil: share of the loss that is the next token's, as in sft; the rest is the divergence.",
        example=0.5,
    )


SETTINGS = (DistilSettings,)
