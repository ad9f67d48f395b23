"""The method: parameters of the base learn, and nothing is added. trainer/tuning/method.py says what each part is
for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.tuning.some_biases.settings import SomeBiasesSettings  # pyright: ignore[reportMissingImports]

from trainer.base.architecture import Architecture
from trainer.config import Model, Optim, Tuning
from trainer.config.section import part
from trainer.tuning.method import ExportedFiles, Method, OfSettings

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class SomeBiases(OfSettings):
    settings: ClassVar[Collection[str]] = ("biases_of",)
    trains_base: ClassVar[bool] = True
    unmergeable: ClassVar[str | None] = "a toy cannot be merged"

    @property
    def _ends(self) -> tuple[str, ...]:
        return tuple(f"{name}.bias" for name in part(self.tuning, SomeBiasesSettings).biases_of)

    def mismatches(self, architecture: Architecture) -> list[str]:
        return [] if self.shapes(architecture) else [f"tuning.biases_of: the base has none of {', '.join(self._ends)}."]

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        return {found.name: found.shape for found in architecture.parameters if found.name.endswith(self._ends)}

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(self._ends))

    def groups(self, model: PreTrainedModel, optim: Optim) -> list[dict[str, Any]]:
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [{"name": "biases", "lr_ratio": 1.0, "params": learning}]

    @contextmanager
    def switched_off(self, model: PreTrainedModel) -> Iterator[None]:
        raise NotImplementedError("a toy keeps no copy of what its base was")
        yield

    def export(self, weights: dict[str, Tensor], model: Model) -> ExportedFiles:
        from safetensors.torch import save

        return ExportedFiles("transformers", "Some biases of a model", {"biases.safetensors": save(weights)})


METHODS: dict[str, Callable[[Tuning], Method]] = {"some_biases": SomeBiases}
