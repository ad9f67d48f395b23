"""The settings of the objective: what training minimises."""

from dataclasses import dataclass
from typing import Literal

from trainer.config.section import Section, declared, setting, with_parts


@dataclass(frozen=True)
class Head:
    """A head that an objective has of its own: it learns beside the method, in the place of the language model's head.

    It is a matrix (outputs, hidden), `biased` with a bias, and has an output for each of `data.labels` where it is `labelled`, else one. It reads the
    last token of a text, or each token (`per_token`). With `several` each output says for itself whether its label holds. `task` is PEFT's name for what it does and `pipeline` the Hub's, `transformers_class` loads base
    and head together, and `what` it is begins a sentence.
    """

    task: str
    pipeline: str
    transformers_class: str
    what: str
    labelled: bool
    biased: bool = False
    per_token: bool = False
    several: bool = False


HEADS: dict[str, Head] = declared("trainer.tuning.objective", "HEADS")
"""The heads of those objectives that have one, by the objective's name: the `settings.py` of an objective's folder names it in `HEADS`."""


@with_parts("trainer.tuning.objective")
class ObjectiveSettings(Section):
    """The loss that training minimises. docs/preference.md, docs/methods.md and docs/distillation.md say when to use which, and give the formulas."""

    name: str = setting(
        "sft",
        about="sft: the next token. dpo, orpo or simpo: a chosen answer against a rejected one (data.format: preference). "
        "kto: desired and undesired answers (data.format: labelled). classification: the class of a text (data.format: classified). "
        "multilabel_classification: any of several (data.format: multilabel). token_classification: "
        "those of words (data.format: tagged). "
        "reward: a number for an answer, by pairs. distil: what a stored teacher says of each target.",
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
        about="dpo and kto: how strongly the model is held to the reference. orpo: weight of the odds ratio beside the next-token "
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
