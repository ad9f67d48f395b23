"""A toy method: the base's own biases learn. One file, as trainer/tuning/method.py wants it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.tuning.method import ExportedFiles, Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.base.architecture import Architecture
    from trainer.config import Model, Optim, Tuning


@dataclass(frozen=True)
class Biases(Method):
    trains_base: ClassVar[bool] = True
    unmergeable: ClassVar[str | None] = "a toy cannot be merged"

    @property
    def identity(self) -> dict[str, Any]:
        return {"method": "biases"}

    def mismatches(self, architecture: Architecture) -> list[str]:
        return [] if self.shapes(architecture) else ["tuning.method: biases needs a base that has some."]

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        return {part.name: part.shape for part in architecture.parameters if part.name.endswith(".bias")}

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(".bias"))

    def groups(self, model: PreTrainedModel, optim: Optim) -> list[dict[str, Any]]:
        biases = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return [{"name": "biases", "lr_ratio": 1.0, "params": biases}]

    @contextmanager
    def switched_off(self, model: PreTrainedModel) -> Iterator[None]:
        raise NotImplementedError("a toy keeps no copy of what its base was")
        yield

    def export(self, weights: dict[str, Tensor], model: Model) -> ExportedFiles:
        from safetensors.torch import save

        return ExportedFiles("transformers", "The biases of a model", {"biases.safetensors": save(weights)})


METHODS: dict[str, Callable[[Tuning], Method]] = {"biases": lambda settings: Biases()}
