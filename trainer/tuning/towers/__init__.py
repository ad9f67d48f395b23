"""Adapters of the part of the base that sees, which learn beside those of the language model.

Each linear layer of the tower and of the projector gets one, of the method's rank and scaling. PEFT's folder has them
under their names in the class that people load.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.tuning.linear_adapters import LowRank, with_peft_files
from trainer.tuning.method import Around, ExportedFiles, Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.base.architecture import Architecture
    from trainer.config import Config, Optim

SETTING = "tuning.towers"
_KINDS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class WithTowers(Around):
    """A method of low-rank adapters, and those of the tower and the projector."""

    low_rank: LowRank

    unmergeable: ClassVar[str | None] = "adapters of the part that sees (tuning.towers) are not merged"

    def own(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        from trainer.model.towers import parameter_name

        rank, shapes = self.low_rank.tuning.rank, dict[str, tuple[int, ...]]()
        for path, (outputs, inputs) in architecture.linears_beside.items():
            shapes[parameter_name(path, "lora_A")] = rank, inputs
            shapes[parameter_name(path, "lora_B")] = outputs, rank
        return shapes

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        from trainer.model.towers import SEEING, Adapters, Matrices

        self.method.attach(model, architecture, dtype, seed)
        embedding: Any = model.get_input_embeddings()
        device: torch.device = embedding.weight.device
        started = {
            path: Matrices(*(values.to(device, dtype) for values in self.start(path, tall, wide, seed)))
            for path, (tall, wide) in architecture.linears_beside.items()
        }
        model.add_module(SEEING, Adapters(started, self.low_rank.scaling, self.low_rank.tuning.dropout))

    def start(self, path: str, outputs: int, inputs: int, seed: int) -> tuple[Tensor, Tensor]:
        """A and B of the layer at `path`, the same on every rank."""
        import torch

        drawn = torch.Generator().manual_seed(zlib.crc32(f"{seed} {path}".encode()))
        return self.low_rank.begun(inputs, outputs, drawn)

    def groups(self, model: PreTrainedModel, optim: Optim) -> list[dict[str, Any]]:
        from trainer.model.towers import SEEING

        named = dict(model.get_submodule(SEEING).named_parameters())
        return [
            *self.method.groups(model, optim),
            *(
                {
                    "name": f"{SEEING}.{kind}",
                    "lr_ratio": optim.lora_plus_ratio if kind == "lora_B" else 1.0,
                    "params": [parameter for name, parameter in named.items() if name.endswith(f"/{kind}")],
                }
                for kind in _KINDS
            ),
        ]

    def added_to(self, theirs: ExportedFiles, ours: dict[str, Tensor], architecture: Architecture) -> ExportedFiles:
        """Adds them under their paths in the whole class, which `beside` marks until the others get theirs."""
        named = {f"{name.replace('/', '.')}.weight": values for name, values in ours.items()}
        exported = with_peft_files(theirs, named)
        return replace(exported, what=f"{theirs.what} of the language model and of the part that sees,")


def with_towers(method: Method, config: Config) -> Method:
    if config.tuning.towers is None:
        return method
    from trainer.tuning.method import innermost

    found = innermost(method)
    assert isinstance(found, LowRank)  # others do not read the setting
    return WithTowers(method, found)


AROUND: dict[str, Callable[[Method, Config], Method]] = {SETTING: with_towers}
