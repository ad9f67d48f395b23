"""The method. trainer/tuning/method.py says what each part is for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.config.section import Section, part, setting
from trainer.tuning.linear_adapters import ALL_LINEAR, LinearAdapters

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.base.architecture import Architecture
    from trainer.config import Tuning
    from trainer.state.checkpoint.learnt_weights import LearntWeights


class LohaSettings(Section):
    """The start of the matrices."""

    spread: float = setting(
        0.1, about="Deviation that the matrices are drawn with, but for one of zeros.", example=0.2, gt=0, le=1
    )


SETTINGS = (LohaSettings,)


_PARTS = tuple(f"hada_{factor}_{side}" for factor in ("w1", "w2") for side in "ab")


@dataclass(frozen=True)
class Product:
    """scaling * (w1_a @ w1_b) * (w2_a @ w2_b), fp32."""

    factors: list[Tensor]
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.factors[0]), self.factors[1].shape[1]

    def apply_to(self, rows: Tensor, first: int) -> None:
        rows = rows.view(-1, self.shape[1])
        w1_a, w1_b, w2_a, w2_b = self.factors
        change = (w1_a @ w1_b) * (w2_a @ w2_b) * self.scaling
        rows.add_(change[first : first + len(rows)])


@dataclass(frozen=True)
class Loha(LinearAdapters):
    what: ClassVar[str] = "A LoHa adapter"
    settings: ClassVar[Collection[str]] = ("rank", "alpha", "targets", "layers", "spread")
    defaults: ClassVar[Mapping[str, Any]] = {"targets": ALL_LINEAR, "layers": None, "spread": 0.1}
    groups_by_end: ClassVar[Mapping[str, str]] = {part: part for part in _PARTS}

    @property
    def _scaling(self) -> float:
        return self.tuning.alpha / self.tuning.rank

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        rank = self.tuning.rank
        return {
            f"{path}.{name}": (linear.outputs, rank) if name.endswith("a") else (rank, linear.inputs)
            for path, linear in self.adapted(architecture).items()
            for name in _PARTS
        }

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        import torch
        from torch import nn
        from trainer.tuning.loha.layer import HadamardLinear  # pyright: ignore[reportMissingImports]

        torch.manual_seed(seed)
        for path in self.adapted(architecture):
            base = model.get_submodule(path)
            assert isinstance(base, nn.Linear)
            spread = part(self.tuning, LohaSettings).spread
            model.set_submodule(path, HadamardLinear(base, self.tuning.rank, self._scaling, spread, dtype))

    def peft_config(self, architecture: Architecture) -> PeftConfig:
        from peft import LoHaConfig

        targets = self.ends(architecture)
        return LoHaConfig(
            task_type="CAUSAL_LM", r=self.tuning.rank, alpha=int(self.tuning.alpha), target_modules=targets
        )

    def updates(self, weights: LearntWeights, architecture: Architecture) -> dict[str, Product]:
        paths = self.adapted(architecture)
        return {
            f"{path}.weight": Product([weights[f"{path}.{name}"].float() for name in _PARTS], self._scaling)
            for path in paths
        }


METHODS: dict[str, Callable[[Tuning], Loha]] = {"loha": Loha}
ABOUT = {"loha": "products of two low-rank matrices"}
