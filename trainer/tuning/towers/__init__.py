"""The base's tower learns, too, beside the adapters of the language model.

`tuning.towers: lora` gives each linear layer of the tower, the projector included, an adapter, of the method's rank and
scaling. With `projector` the weights of the projector learn whole. What is trained is their change, which begins as
zeros, so the base's own weights are the reference at any time. PEFT's folder has either under its name in the class
that people load, and a merge changes the base's own tensors.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from trainer.errors import ConfigError
from trainer.tuning.linear_adapters import LowRank, LowRankUpdate, with_peft_files
from trainer.tuning.method import Around, ExportedFiles, Method, WeightUpdate, innermost

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.base.architecture import Architecture
    from trainer.config import Config, Model, Optim
    from trainer.state.checkpoint.learnt_weights import LearntWeights

SETTING = "tuning.towers"
_KINDS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class WithTowers(Around):
    """A method of low-rank adapters, and those of the tower."""

    low_rank: LowRank

    def own(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        from trainer.model.towers import parameter_name

        rank, shapes = self.low_rank.tuning.rank, dict[str, tuple[int, ...]]()
        for path, (outputs, inputs) in architecture.linears_beside.items():
            shapes[parameter_name(path, "lora_A")] = rank, inputs
            shapes[parameter_name(path, "lora_B")] = outputs, rank
        return shapes

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        from trainer.model.towers import AdaptedLayers, parameter_name

        self.method.attach(model, architecture, dtype, seed)
        started = {
            parameter_name(path, kind): values
            for path, (tall, wide) in architecture.linears_beside.items()
            for kind, values in zip(_KINDS, self.start(path, tall, wide, seed), strict=True)
        }
        scaling, dropout = self.low_rank.scaling, self.low_rank.tuning.dropout
        _lend(model, started, dtype, partial(AdaptedLayers, list(architecture.linears_beside), scaling, dropout))

    def sees(self, architecture: Architecture) -> dict[str, Any]:
        adapters, dropout = list(architecture.linears_beside), self.low_rank.tuning.dropout
        return {"shapes": self.own(architecture), "adapters": adapters, "dropout": dropout, "changes": {}}

    def start(self, path: str, outputs: int, inputs: int, seed: int) -> tuple[Tensor, Tensor]:
        """A and B of the layer at `path`, the same on every rank."""
        import torch

        drawn = torch.Generator().manual_seed(zlib.crc32(f"{seed} {path}".encode()))
        return self.low_rank.begun(inputs, outputs, drawn)

    def groups(self, model: PreTrainedModel, optim: Optim) -> list[dict[str, Any]]:
        from trainer.model.towers import SEEING

        named = dict(model.get_submodule(SEEING).named_parameters())
        return [
            *_without_ours(self.method.groups(model, optim), model),
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
        """Adds them under their paths in the whole class, which `seeing_name` marks until the others get theirs."""
        named = {f"{name.replace('/', '.')}.weight": values for name, values in ours.items()}
        exported = with_peft_files(theirs, named)
        return replace(exported, what=f"{theirs.what} of the language model and of the tower,")

    def own_updates(self, weights: LearntWeights, architecture: Architecture) -> dict[str, WeightUpdate]:
        from trainer.model.towers import parameter_name, seeing_name

        updates = dict[str, WeightUpdate]()
        for path in architecture.linears_beside:
            down, up = (weights[parameter_name(path, kind)] for kind in _KINDS)
            updates[seeing_name(f"{path}.weight")] = LowRankUpdate(up, down, self.low_rank.scaling)
        return updates


@dataclass(frozen=True)
class WithProjector(Around):
    """A method over a frozen base, and the weights of the projector, which learn."""

    def own(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        return {name: shape for name, (_, shape) in _changes(architecture).items()}

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        import torch

        from trainer.model.towers import ChangedWeights

        self.method.attach(model, architecture, dtype, seed)
        zeros = {name: torch.zeros(shape) for name, shape in self.own(architecture).items()}
        _lend(model, zeros, dtype, partial(ChangedWeights, architecture.projector))

    def sees(self, architecture: Architecture) -> dict[str, Any]:
        changes = {path: list(parts) for path, parts in architecture.projector.items()}
        return {"shapes": self.own(architecture), "adapters": [], "dropout": 0.0, "changes": changes}

    def groups(self, model: PreTrainedModel, optim: Optim) -> list[dict[str, Any]]:
        """No weight decay: it would draw the weights to those of the base."""
        from trainer.model.towers import SEEING

        ours = list(model.get_submodule(SEEING).parameters())
        theirs = _without_ours(self.method.groups(model, optim), model)
        return [*theirs, {"name": SEEING, "lr_ratio": optim.modules_ratio, "weight_decay": 0.0, "params": ours}]

    def export(self, weights: dict[str, Tensor], model: Model) -> ExportedFiles:
        """PEFT's folder of the method, with the weights of the projector as the forward pass of the training had them.

        `seeing_name` marks their names until the others get theirs."""
        from trainer.base.find.locate import describe_base, resolve_base
        from trainer.base.load.front import values_beside
        from trainer.model.towers import seeing_name

        architecture = describe_base(model).architecture
        changes = {whole: weights.pop(name) for name, (whole, _) in _changes(architecture).items()}
        base = values_beside(resolve_base(model), model.layers, changes)
        ours = {seeing_name(name): base[name].to(change.dtype) + change for name, change in changes.items()}
        theirs = self.method.export(weights, model)
        exported = with_peft_files(theirs, ours, modules_to_save=list(map(seeing_name, architecture.projector)))
        return replace(exported, what=f"{theirs.what} of the language model, with the projector's weights,")

    def own_updates(self, weights: LearntWeights, architecture: Architecture) -> dict[str, WeightUpdate]:
        from trainer.model.towers import seeing_name

        return {
            seeing_name(whole): LearntChange(weights, name, shape)
            for name, (whole, shape) in _changes(architecture).items()
        }


@dataclass(frozen=True)
class LearntChange:
    """Adds what the parameter `name` has learnt to a weight of this shape."""

    weights: LearntWeights
    name: str
    shape: tuple[int, ...]

    def apply_to(self, rows: Tensor, first: int) -> None:
        begin = first * self.shape[-1]
        rows.add_(self.weights.part(self.name, begin, begin + rows.numel()).view_as(rows))


def _changes(architecture: Architecture) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in the model of each change -> name in the whole class of the weight that changes, and its shape."""
    from trainer.model.towers import parameter_name

    return {
        parameter_name(path, name.replace(".", "/")): (f"{path}.{name}", tuple(shape))
        for path, parts in architecture.projector.items()
        for name, shape in parts.items()
    }


def _without_ours(groups: list[dict[str, Any]], model: PreTrainedModel) -> list[dict[str, Any]]:
    """The groups of a method, which may take everything that learns."""
    from trainer.model.towers import SEEING

    ours = {id(parameter) for parameter in model.get_submodule(SEEING).parameters()}
    return [
        {**group, "params": [parameter for parameter in group["params"] if id(parameter) not in ours]}
        for group in groups
    ]


def _lend(
    model: PreTrainedModel,
    values: Mapping[str, Tensor],
    dtype: torch.dtype,
    borrowing: Callable[[Any], Any],
) -> None:
    """Add what learns to the language model."""
    from trainer.model.towers import SEEING, Lender

    embedding: Any = model.get_input_embeddings()
    device: torch.device = embedding.weight.device
    placed = {name: value.to(device, dtype) for name, value in values.items()}
    model.add_module(SEEING, Lender(placed, borrowing))


def with_towers(method: Method, config: Config) -> Method:
    if config.tuning.towers == "projector":
        return WithProjector(method)
    if config.tuning.towers is None:
        return method
    found = innermost(method)
    if isinstance(found, LowRank) and found.adapts_towers:
        return WithTowers(method, found)
    raise ConfigError(
        f"{SETTING}: lora works only with tuning.method lora or rslora, and tuning.method is {config.tuning.method}."
        f" Set {SETTING}: projector, which works with adapters of any kind."
    )


AROUND: dict[str, Callable[[Method, Config], Method]] = {SETTING: with_towers}
