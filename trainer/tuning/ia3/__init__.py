"""(IA)^3 (arXiv:2205.05638): learnt vectors scale keys, values and the MLP's inner activations, element by element.

A layer's vector is (outputs, 1) and scales its output, bias included. In a feed-forward layer the vector is (1, inputs)
and scales the input. These are PEFT's shapes and names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.config.section import Section, part, setting
from trainer.tuning.linear_adapters import (
    LinearAdapters,
    Targets,
    matching,
    shortest_ends,
)

if TYPE_CHECKING:
    import torch
    from peft import IA3Config
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.base.architecture import Architecture
    from trainer.config import Tuning
    from trainer.state.checkpoint.learnt_weights import LearntWeights


class Ia3Settings(Section):
    """Its vectors."""

    feedforward: list[str] | None = setting(
        None,
        about=(
            "The targets whose inputs ia3 scales. For all other targets, it scales the outputs. Default: the targets"
            " that end in down_proj."
        ),
        example=["down_proj"],
    )


SETTINGS = (Ia3Settings,)


# Keys, values, and the product that the MLP's inner activations enter.
_AUTO = ["k_proj", "v_proj", "down_proj"]
_FEEDFORWARD = "down_proj"
_VECTOR = "ia3_l"


@dataclass(frozen=True)
class Scaling:
    """A weight (outputs, inputs) times `factors`, (outputs, 1) or (1, inputs), fp32.

    A bias (outputs,) is one row, times (1, outputs)."""

    shape: tuple[int, ...]
    factors: Tensor

    def apply_to(self, rows: Tensor, first: int) -> None:
        rows = rows.view(-1, self.shape[-1])
        factors = self.factors if len(self.factors) == 1 else self.factors[first : first + len(rows)]
        rows.copy_(rows.float() * factors)


@dataclass(frozen=True)
class Ia3(LinearAdapters):
    """Vectors that scale the outputs, or the inputs, of linear layers."""

    what: ClassVar[str] = "An (IA)^3 adapter"
    settings: ClassVar[Collection[str]] = ("targets", "layers", "feedforward", "modules_to_save", "towers")
    defaults: ClassVar[Mapping[str, Any]] = {
        "targets": _AUTO,
        "layers": None,
        "feedforward": None,
        "modules_to_save": [],
        "towers": None,
    }
    auto: ClassVar[Targets] = _AUTO
    groups_by_end: ClassVar[Mapping[str, str]] = {_VECTOR: _VECTOR}
    counts_activations: ClassVar[bool] = True
    adapts_4_bits: ClassVar[bool] = True

    def mismatches(self, architecture: Architecture) -> list[str]:
        targets = self._names(architecture)
        strangers = [name for name in part(self.tuning, Ia3Settings).feedforward or () if name not in targets]
        found = [
            f"tuning.feedforward: {name!r} is none of tuning.targets ({', '.join(targets)}). Name it there too, or"
            " remove it."
            for name in strangers
        ]
        missing = [target for target in targets if not matching(architecture, [target])]
        if self.tuning.targets == "auto" and missing:
            return [
                *found,
                (
                    f"tuning.targets: auto is {', '.join(_AUTO)} with tuning.method: ia3, but the base has no"
                    f" {', '.join(missing)}. Name layers of it: {', '.join(architecture.linear_names)}."
                ),
            ]
        return [*found, *super().mismatches(architecture)]

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        inputs_scaled = self._inputs_scaled(architecture)
        return {
            f"{path}.{_VECTOR}": (1, linear.inputs) if path in inputs_scaled else (linear.outputs, 1)
            for path, linear in self.adapted(architecture).items()
        }

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        from torch import nn

        from trainer.tuning.ia3.layer import ScaledLinear

        inputs_scaled = self._inputs_scaled(architecture)
        for path in self.adapted(architecture):
            base = model.get_submodule(path)
            assert isinstance(base, nn.Linear)
            model.set_submodule(path, ScaledLinear(base, path in inputs_scaled, dtype))

    def _names(self, architecture: Architecture) -> list[str]:
        return architecture.linear_names if isinstance(self.targets, str) else self.targets

    def _inputs_scaled(self, architecture: Architecture) -> Collection[str]:
        """Paths of feed-forward layers."""
        given = part(self.tuning, Ia3Settings).feedforward
        if given is not None:
            return matching(architecture, given)
        return {path for path in self.adapted(architecture) if path.endswith(_FEEDFORWARD)}

    def peft_config(self, architecture: Architecture) -> IA3Config:
        from peft import IA3Config

        feedforward = shortest_ends(architecture, self._inputs_scaled(architecture))
        return IA3Config(task_type="CAUSAL_LM", target_modules=self.ends(architecture), feedforward_modules=feedforward)

    def updates(self, weights: LearntWeights, architecture: Architecture) -> dict[str, Scaling]:
        names = {parameter.name for parameter in architecture.parameters}
        updates: dict[str, Scaling] = {}
        for path, linear in self.adapted(architecture).items():
            factors = weights[f"{path}.{_VECTOR}"].float()
            updates[f"{path}.weight"] = Scaling((linear.outputs, linear.inputs), factors)
            if factors.shape == (linear.outputs, 1) and f"{path}.bias" in names:
                updates[f"{path}.bias"] = Scaling((linear.outputs,), factors.view(1, linear.outputs))
        return updates


METHODS: dict[str, Callable[[Tuning], Ia3]] = {"ia3": Ia3}
ABOUT = {"ia3": "learnt vectors that scale keys, values and the MLP's inner activations"}
