"""DoRA (arXiv:2402.09353): LoRA's two matrices turn the rows of a weight, and a learnt vector gives their lengths.

The weight becomes magnitude * (W + scaling * B @ A) / |W + scaling * B @ A|, row by row, with scaling = alpha / rank. A
is (rank, inputs), B (outputs, rank), the magnitude (outputs,).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.base.architecture import Architecture
from trainer.config import Tuning
from trainer.tuning.shared.linear_adapters import LowRank, taken_for_experts

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.state.checkpoint.learnt_weights import LearntWeights

# The names in trainer/tuning/dora/layer.py, which are PEFT's; PEFT saves the matrices as those of linear layers.
_DOWN, _UP, _MAGNITUDE = "lora_A", "lora_B", "lora_magnitude_vector"
_SAVED_AS = {_DOWN: f"{_DOWN}.weight", _UP: f"{_UP}.weight", _MAGNITUDE: _MAGNITUDE}


@dataclass(frozen=True)
class DoraUpdate:
    """Replaces W by magnitude * (W + scaling * up @ down) / |W + scaling * up @ down|.

    up (outputs, rank), down (rank, inputs), magnitude (outputs,), fp32. The norm is that of the weight into which the
    update is merged, as in PEFT."""

    up: Tensor
    down: Tensor
    magnitude: Tensor
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], self.down.shape[1]

    def apply_to(self, rows: Tensor, first: int) -> None:
        rows = rows.view(-1, self.shape[1])
        part = slice(first, first + len(rows))
        turned = (self.up[part] @ self.down).mul_(self.scaling).add_(rows)
        rows.copy_(turned.mul_((self.magnitude[part] / turned.norm(dim=1)).unsqueeze(1)))


@dataclass(frozen=True)
class Dora(LowRank):
    """Adapters on linear layers, with a magnitude for each of their outputs."""

    what: ClassVar[str] = "A DoRA adapter"
    groups_by_end: ClassVar[Mapping[str, str]] = {kind: kind for kind in (_DOWN, _UP, _MAGNITUDE)}

    def mismatches(self, architecture: Architecture) -> list[str]:
        found = super().mismatches(architecture)
        if taken := taken_for_experts(architecture, self.ends(architecture)):
            found.append(
                f"tuning.method: dora cannot be exported for {', '.join(taken)} of this base, which PEFT takes for its"
                " experts. Leave them out of tuning.targets, or set tuning.method: lora."
            )
        return found

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        rank, shapes = self.tuning.rank, dict[str, tuple[int, ...]]()
        for path, linear in self.adapted(architecture).items():
            shapes[f"{path}.{_DOWN}"] = (rank, linear.inputs)
            shapes[f"{path}.{_UP}"] = (linear.outputs, rank)
            shapes[f"{path}.{_MAGNITUDE}"] = (linear.outputs,)
        return shapes

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        """The magnitudes start as the row norms of the base.

        Each layer is gathered once, by itself, so every rank gets the same values.
        """
        import torch
        from torch import nn

        from trainer.state.zero.engine import gathered
        from trainer.tuning.dora.layer import DoraLinear

        torch.manual_seed(seed)
        for path in self.adapted(architecture):
            base = model.get_submodule(path)
            assert isinstance(base, nn.Linear)
            with gathered(base):
                layer = DoraLinear(base, self.tuning.rank, self.scaling, self.tuning.dropout, dtype)
            model.set_submodule(path, layer)

    @property
    def options(self) -> dict[str, Any]:
        return {"use_dora": True}

    def saved_name(self, name: str) -> str:
        path, _, kind = name.rpartition(".")
        return f"{path}.{_SAVED_AS[kind]}"

    def updates(self, weights: LearntWeights, architecture: Architecture) -> dict[str, DoraUpdate]:
        updates: dict[str, DoraUpdate] = {}
        for path in self.adapted(architecture):
            up, down, magnitude = (weights[f"{path}.{kind}"].float() for kind in (_UP, _DOWN, _MAGNITUDE))
            updates[f"{path}.weight"] = DoraUpdate(up, down, magnitude, self.scaling)
        return updates


METHODS: dict[str, Callable[[Tuning], Dora]] = {"dora": Dora}
ABOUT = {"dora": "those of lora, and a length for each row of a weight"}
