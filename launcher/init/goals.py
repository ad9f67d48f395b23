"""The goals that a first configuration may have: what each sets, and why."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Goal:
    """A goal: its settings with the reason for each, its learning rate, and the data that it needs, in words.

    `rates`: the learning rate for bases up to 13 billion weights, and for larger ones. `tokens`: about so many in a step.
    """

    about: str
    data: str
    rates: tuple[float, float]
    rate_source: str
    tokens: int = 65536
    trains_base: bool = False
    settings: Mapping[str, tuple[Any, str]] = field(default_factory=dict[str, tuple[Any, str]])


_LORA = {
    "tuning.method": ("lora", "small matrices beside every linear layer; docs/methods.md has the others"),
    "tuning.rank": (16, "more holds more; 16 suffices for most"),
    "tuning.alpha": (32, "twice the rank"),
    "tuning.targets": ("all-linear", "attention and MLP alike, which learns best"),
}
_FULL = {
    "tuning.method": ("full", "every weight of the base learns"),
    "quant.type": ("none", "what learns is in 16 bits"),
}
_LORA_RATE = "QLoRA's, for bases of this size"
_BETA = {"objective.beta": (0.1, "how strongly it is held to the base")}
_ANSWERS = "prompt, chosen and rejected in each row"


def _compares(
    name: str, about: str, data: str, rate: float, source: str, more: Mapping[str, tuple[Any, str]] | None = None
) -> Goal:
    """A goal that compares answers."""
    settings = {**_LORA, "objective.name": (name, about), **(more or {})}
    return Goal(about, data, (rate, rate), source, settings=settings)


GOALS: Mapping[str, Goal] = {
    "sft": Goal(
        "answer as the data does, with an adapter (QLoRA)",
        "conversations, prompts with answers, or texts",
        (2e-4, 1e-4),
        _LORA_RATE,
        settings=_LORA,
    ),
    "full": Goal(
        "the same with every weight of the base",
        "conversations, prompts with answers, or texts",
        (2e-5, 1e-5),
        "usual where the base itself learns",
        trains_base=True,
        settings=_FULL,
    ),
    "dpo": _compares(
        "dpo",
        "prefer chosen answers over rejected ones",
        _ANSWERS,
        5e-6,
        "low, as the base answers well already",
        _BETA,
    ),
    "orpo": _compares("orpo", "the same together with sft, without a reference", _ANSWERS, 8e-6, "the paper's"),
    "simpo": _compares(
        "simpo",
        "the same by mean log-probabilities, without a reference",
        _ANSWERS,
        1e-6,
        "the paper's upper end",
    ),
    "kto": _compares(
        "kto",
        "prefer answers marked as desired over others",
        "prompt, completion and label in each row",
        5e-6,
        "low, as the base answers well already",
        _BETA,
    ),
}
