"""Full fine-tuning: the base's own parameters learn, all of them or those that `tuning.train` names.

ZeRO-3 divides the 16-bit weights, their fp32 masters, the moments and the gradients over all ranks: with AdamW about 18
bytes a parameter over the world size (ZeRO, arXiv:1910.02054, section 3.1). Matrices decay, norms and biases do not, as
in GPT-3's training and in transformers' Trainer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from trainer.config.section import Section, check_patterns, expression, part, setting
from trainer.errors import ConfigError
from trainer.tuning.method import ExportedFiles, MethodOfSettings, TrainedWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.base.architecture import Architecture, Parameter
    from trainer.config import Model, Optim, Tuning
    from trainer.state.checkpoint.learnt_weights import LearntWeights


_FROM_END = re.compile(r"\.-[\d(\[]")


class FullSettings(Section):
    """The parameters that learn."""

    train: Literal["all"] | list[str] = setting(
        "all",
        about=(
            "Which parameters of the base learn with method full: all, or a list. Each entry is a pattern for the"
            " whole name of a parameter, in which * is any text, or re: and a regular expression for the whole name."
            " In the place of a layer's number, -1 is the last layer and -2 the one before."
        ),
        example=["model.layers.-1.*", "*norm.weight"],
    )

    @field_validator("train")
    @classmethod
    def _expressions_of_train(cls, train: str | list[str]) -> str | list[str]:
        check_patterns("tuning.train", train)
        return train


SETTINGS = (FullSettings,)


@dataclass(frozen=True)
class Full(MethodOfSettings):
    """The base itself learns. `tuning.train` has patterns of the names of the parameters that learn."""

    settings: ClassVar[Collection[str]] = ("train",)
    defaults: ClassVar[Mapping[str, Any]] = {"train": "all"}
    trains_base: ClassVar[bool] = True
    counts_activations: ClassVar[bool] = True
    exports_model: ClassVar[bool] = True
    # Nothing loads without config.json, and only a complete export has it.
    file_names: ClassVar[Collection[str]] = ("*.safetensors", "*.safetensors.index.json", "generation_config.json")

    @property
    def _patterns(self) -> list[str]:
        train = part(self.tuning, FullSettings).train
        return ["*"] if train == "all" else train

    def mismatches(self, architecture: Architecture) -> list[str]:
        if not self._patterns:
            return ["tuning.train: [] trains nothing. Name parameters by patterns, or set tuning.train: all."]
        every = [_names(parameter, architecture) for parameter in architecture.parameters]
        shown = ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", names[0]) for names in every))
        return [
            f"tuning.train: {pattern!r} matches no parameter of the base. Patterns are of whole names, and * is any"
            f" text. The base has {shown}."
            for pattern in self._patterns
            if not any(_matches(pattern, names) for names in every)
        ]

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        return {
            parameter.name: parameter.shape
            for parameter in architecture.parameters
            if any(_matches(pattern, _names(parameter, architecture)) for pattern in self._patterns)
        }

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        from trainer.state.zero.partition import let_learn

        learning = self.shapes(architecture)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(False)
            if name in learning:
                let_learn(parameter, dtype)

    def groups(self, model: PreTrainedModel, optim: Optim) -> list[dict[str, Any]]:
        """Two groups: matrices, with weight decay, and all other parameters, without it."""
        from trainer.state.zero.partition import whole_shape

        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in learning if len(whole_shape(parameter)) > 1]
        vectors = [parameter for parameter in learning if len(whole_shape(parameter)) <= 1]
        groups = [
            {"name": "matrices", "lr_ratio": 1.0, "weight_decay": optim.weight_decay, "params": matrices},
            {"name": "vectors", "lr_ratio": 1.0, "weight_decay": 0.0, "params": vectors},
        ]
        return [group for group in groups if group["params"]]

    @contextmanager
    def switched_off(self, model: PreTrainedModel) -> Iterator[None]:
        """Raises `ConfigError`, because no rank keeps the untrained base."""
        raise ConfigError(
            f"tuning.method: {self.tuning.method} cannot be switched off, as the base itself learns. Use a method that"
            " adds to the base, such as lora."
        )
        yield

    def export(self, weights: dict[str, Tensor], model: Model) -> ExportedFiles:
        raise AssertionError("an export is the whole model")

    def updates(self, weights: LearntWeights, architecture: Architecture) -> dict[str, TrainedWeight]:
        return {name: TrainedWeight(weights, name, shape) for name, shape in self.shapes(architecture).items()}


def _names(parameter: Parameter, architecture: Architecture) -> list[str]:
    """Return the parameter's name, and for a layer's parameter also the one with the layer counted from the end."""
    if parameter.layer is None:
        return [parameter.name]
    from_end = parameter.layer - architecture.layers
    return [parameter.name, parameter.name.replace(f".{parameter.layer}.", f".{from_end}.", 1)]


def _matches(pattern: str, names: Sequence[str]) -> bool:
    """Return whether the pattern means a parameter with these names.

    The second name counts only for patterns that count from the end. In other patterns a star before a number would
    also match the sign."""
    asked = names if _FROM_END.search(pattern) else names[:1]
    return any(expression(pattern).fullmatch(name) for name in asked)


METHODS: dict[str, Callable[[Tuning], Full]] = {"full": Full}
ABOUT = {"full": "the parameters of the base itself; needs quant.type: none"}
