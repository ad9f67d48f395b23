"""Group relative policy optimisation: learning from answers that the model samples, and from their rewards.

Its settings are read by grpo, and some of them by opd.
"""

from typing import Literal

from trainer.config.section import Multiple, Section, setting


class GrpoSettings(Section):
    """The form of the loss."""

    ratio: Literal["clipped", "truncated"] = setting(
        "clipped",
        about=(
            "grpo and opd: how the ratio of the model's probability to the sampler's enters the loss. clipped: as in"
            " PPO, within [1 - clip_low, 1 + clip_high]. truncated: as a weight without a gradient, at most 1 +"
            " clip_high, so that every token keeps a gradient (CISPO, truncated importance sampling)."
        ),
        example="truncated",
    )
    ratio_of: Literal["token", "answer"] = setting(
        "token",
        about=(
            "grpo: token is each token's own ratio, answer the geometric mean over its answer (GSPO, with clip_low:"
            " 3.0e-4 and clip_high: 4.0e-4)."
        ),
        example="answer",
    )
    clip_low: float = setting(
        0.2, about="grpo and opd: how far below 1 a ratio may go, with ratio: clipped.", example=0.1, gt=0, lt=1
    )
    clip_high: Multiple = setting(0.2, about="grpo and opd: how far above 1 a ratio may go.", example=0.28)
    mean_over: Literal["answers", "tokens", "constant"] = setting(
        "answers",
        about=(
            "grpo and opd. answers: the mean over the tokens of each answer, then over the answers. tokens: the mean"
            " over all tokens (DAPO). constant: the sum over the tokens of each answer divided by longest_answer, then"
            " the mean over answers (Dr. GRPO)."
        ),
        example="constant",
    )
    longest_answer: int = setting(
        256,
        about="grpo and opd with mean_over: constant: the number of tokens by which each answer's sum is divided.",
        example=1024,
        ge=1,
        unit="tokens",
    )
    advantage: Literal["standardised", "centred"] = setting(
        "standardised",
        about=(
            "grpo: an answer's reward minus the mean over its prompt's answers. standardised divides it by their"
            " standard deviation, centred does not (Dr. GRPO)."
        ),
        example="centred",
    )


SETTINGS = (GrpoSettings,)
