"""The settings of the objective: what training minimises."""

from typing import TYPE_CHECKING, Literal

from trainer.config.section import Section, declared, setting, with_parts

if TYPE_CHECKING:
    from trainer.tuning.objective.head import Head

HEADS: "dict[str, Head]" = declared("trainer.tuning.objective", "HEADS")
"""The heads of those objectives that have one of their own, by the objective's name."""


@with_parts("trainer.tuning.objective")
class ObjectiveSettings(Section):
    """The loss that training minimises. docs/preference.md, docs/methods.md, docs/distillation.md and docs/rollouts.md say when to use which, and give the formulas."""

    name: str = setting(
        "sft",
        about="sft: the next token. dpo, orpo or simpo: a chosen answer against a rejected one (data.format: preference). "
        "kto: desired and undesired answers (data.format: labelled). classification: the class of a text (data.format: classified). token_classification: "
        "those of words (data.format: tagged). "
        "reward: a number for an answer, by pairs. distil: what a stored teacher says of each target. grpo: what sampled answers are worth.",
        example="dpo",
    )
    reference: Literal["auto", "adapter_off", "stored"] = setting(
        "auto",
        about="dpo and kto: where the base's log-probabilities come from. adapter_off: a second pass in every step, with what learns "
        "switched off. stored: one pass over all data before the first step, kept beside the data. auto: adapter_off where the "
        "method can be switched off, else stored.",
        example="stored",
    )
    beta: float | None = setting(
        None,
        about="dpo and kto: how strongly the model is held to the reference. grpo: weight of the divergence from the base, 0 by default. orpo: weight of the odds ratio beside the next-token "
        "loss. simpo: scale of the log-probability a token. Default: 0.1, for simpo 2.",
        example=0.1,
        gt=0,
        le=100,
    )
    label_smoothing: float = setting(
        0.0,
        about="sft: share of a target's loss that is the mean over the vocabulary. dpo with loss_type: sigmoid: share of the "
        "pairs that are thought to be the wrong way round, below 0.5.",
        example=0.1,
        ge=0,
        lt=1,
        unit="share",
    )
