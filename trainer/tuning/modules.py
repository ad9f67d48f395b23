"""Whole modules of the base that learn beside an adapter, in 16 bits, such as norms, the embedding or routers.

`tuning.modules_to_save` names them as PEFT does, by the end of their paths. Their parameters learn as with method full.
PEFT's folder holds them whole, beside the adapter. There a tied embedding is two modules with the same weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.errors import ConfigError
from trainer.tuning.linear_adapters import with_peft_files
from trainer.tuning.method import Around, ExportedFiles, Method, TrainedWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.base.architecture import Architecture, Parameter
    from trainer.config import Config, Optim
    from trainer.state.checkpoint.learnt_weights import LearntWeights

SETTING = "tuning.modules_to_save"


@dataclass(frozen=True)
class WithModules(Around):
    """A method over a frozen base, and the modules of the base called `names`, which learn."""

    names: list[str]
    adds_tokens: bool

    trains_base: ClassVar[bool] = True

    def mismatches(self, architecture: Architecture) -> list[str]:
        found = self.method.mismatches(architecture)
        small = [path for path, parts in _modules(architecture).items() if all(map(_may_learn, parts))]
        shown = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in small))
        for name in self.names:
            matched = _matching(architecture, [name])
            if not matched or not all(_may_learn(part) for parts in matched.values() for part in parts):
                what = (
                    "is no module of the base"
                    if not matched
                    else "has linear layers or experts in it, which stay frozen"
                )
                found.append(f"{SETTING}: {name!r} {what}. Name some of {shown}.")
            elif self.adds_tokens and _own(matched).keys() & {architecture.embedding, architecture.head}:
                found.append(
                    f"{SETTING}: {name!r} learns whole, and model.add_tokens has some of its rows learn. Remove one of"
                    " them."
                )
        return found

    def own(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        return _own(_matching(architecture, self.names))

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        from trainer.state.zero.partition import let_learn

        self.method.attach(model, architecture, dtype, seed)
        parameters = dict(model.named_parameters())
        for name in self.own(architecture):
            let_learn(parameters[name], dtype)

    def groups(self, model: PreTrainedModel, optim: Optim) -> list[dict[str, Any]]:
        """The modules get no weight decay, which would also shrink the rows of tokens that the data lacks."""
        theirs = self.method.groups(model, optim)
        taken = {id(parameter) for group in theirs for parameter in group["params"]}
        ours = [part for part in model.parameters() if part.requires_grad and id(part) not in taken]
        return [*theirs, {"name": "modules", "lr_ratio": optim.modules_ratio, "weight_decay": 0.0, "params": ours}]

    @contextmanager
    def switched_off(self, model: PreTrainedModel) -> Iterator[None]:
        """Raises `ConfigError`, because no rank keeps the untrained modules."""
        raise ConfigError(f"{SETTING}: modules of the base learn, and no rank keeps them as they were. Remove it.")
        yield

    def added_to(self, theirs: ExportedFiles, ours: dict[str, Tensor], architecture: Architecture) -> ExportedFiles:
        """Adds the modules, a tied one under both of its names."""
        ours |= {alias: ours[name].clone() for alias, name in architecture.tied.items() if name in ours}
        paths = sorted({name.rpartition(".")[0] for name in ours})
        return with_peft_files(theirs, ours, modules_to_save=paths)

    def own_updates(self, weights: LearntWeights, architecture: Architecture) -> dict[str, TrainedWeight]:
        return {name: TrainedWeight(weights, name, shape) for name, shape in self.own(architecture).items()}


def _modules(architecture: Architecture) -> dict[str, list[Parameter]]:
    """Path in the model -> all parameters below it, for every module that has parameters."""
    found: dict[str, list[Parameter]] = {}
    for parameter in architecture.parameters:
        aliases = [alias for alias, name in architecture.tied.items() if name == parameter.name]
        for name in [parameter.name, *aliases]:
            *parts, _ = name.split(".")
            for end in range(1, len(parts) + 1):
                found.setdefault(".".join(parts[:end]), []).append(parameter)
    return found


def _matching(architecture: Architecture, names: list[str]) -> dict[str, list[Parameter]]:
    """Those modules whose paths end in one of `names`."""
    ends = tuple(f".{name}" for name in names)
    return {path: parts for path, parts in _modules(architecture).items() if f".{path}".endswith(ends)}


def _own(modules: dict[str, list[Parameter]]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of their parameters."""
    return {part.name: part.shape for parts in modules.values() for part in parts}


def _may_learn(parameter: Parameter) -> bool:
    """Whether it is always held in 16 bits and has no adapter."""
    return parameter.kind not in ("linear", "experts")


def with_modules(method: Method, config: Config) -> Method:
    names = config.tuning.modules_to_save
    if config.optim.modules_ratio != 1 and not names and config.tuning.towers != "projector":
        raise ConfigError(f"optim.modules_ratio: has no effect without {SETTING}. Name modules there, or remove it.")
    return WithModules(method, names, bool(config.model.add_tokens)) if names else method


AROUND: dict[str, Callable[[Method, Config], Method]] = {SETTING: with_modules}
