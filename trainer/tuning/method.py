"""The interface of a way to fine-tune, and how one is found by its name in `tuning.method`.

A method is one file in this folder. Its `METHODS` maps each name that `tuning.method` may have to a function that makes
the method from the section's settings; a file without `METHODS` is something that several methods share. Importing the
file loads no torch, as `plan` counts on a login node; code that handles tensors imports torch when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from trainer.base.architecture import Architecture
from trainer.config import Config, Model, Optim, Tuning
from trainer.config.registry import chosen, kinds, refuse_unread, without_defaults
from trainer.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.state.checkpoint.learnt_weights import LearntWeights

# Settings outside the section `tuning` that not every method reads.
OPTIM_OF_SOME = ("optim.lora_plus_ratio",)


class WeightUpdate(Protocol):
    """The change of one weight of the base in a merge. Its rows are those of a matrix (-1, shape[-1])."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def apply_to(self, rows: Tensor, first: int) -> None:
        """Change some whole rows of the weight in place, flat as they are stored, computing in fp32; `first` is the
        number of the first of them."""
        ...


@dataclass(frozen=True)
class TrainedWeight:
    """The trained values of the base's own parameter `name`, read from the checkpoint as they are needed."""

    weights: LearntWeights
    name: str
    shape: tuple[int, ...]

    def apply_to(self, rows: Tensor, first: int) -> None:
        begin = first * self.shape[-1]
        rows.copy_(self.weights.part(self.name, begin, begin + rows.numel()))


@dataclass(frozen=True)
class ExportedFiles:
    """The files of an export beside the tokenizer. `library` loads them, and `what` says what they are, to begin a
    sentence; `files` are in the order in which they are written, and without the last one nothing loads."""

    library: str
    what: str
    files: dict[str, bytes]


@dataclass(frozen=True)
class VirtualTokens:
    """Tokens that are learnt and stand before the first token of each document, `count` of them.

    They take the first positions of the document in its packed row (`in_row`), or lie beside the row as keys and
    values. `refused_kernels` gives for each attention kernel that cannot compute with them the reason, as a clause.
    """

    count: int = 0
    in_row: bool = False
    refused_kernels: Mapping[str, str] = field(default_factory=dict)

    @property
    def reserved(self) -> int:
        """Positions of a packed row before each document."""
        return self.count if self.in_row else 0

    def longest(self, positions: int | None) -> int | None:
        """Tokens of the longest text behind them, by a base with so many positions; None where it has no limit."""
        return positions - self.count if positions else None


class Method(Protocol):
    """One way to fine-tune, with the settings of one run. A class of it says what is not so of most."""

    settings: ClassVar[Collection[str]] = ()
    """The settings of the section `tuning` that it reads, and those of `OPTIM_OF_SOME`, with their section. A value for
    any other of them is refused, as it would be ignored. So are settings of what learns beside a method, see
    `method_of`."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """The meaning of a key that an identity lacks. A key that is added later comes with a default of here, so that
    older checkpoints stay what they are; a default never changes, whatever becomes of the configuration's."""
    trains_base: ClassVar[bool] = False
    """Whether parameters of the base learn, so that one copy of them must be divided over all ranks."""
    counts_activations: ClassVar[bool] = False
    """Whether `plan` counts all that a layer keeps for its backward pass. The memory of a method that does not say so
    is counted with all layers computed again, and `train.activation_checkpointing: auto` has them so."""
    adapts_4_bits: ClassVar[bool] = False
    """Whether whoever loads its exports can put them over bitsandbytes' layers in 4 bits. `--verify` gives the others
    the values that such layers stand for, in 16 bits."""
    exports_model: ClassVar[bool] = False
    """Whether an export is the whole model, the base's own files with `updates` in them, so that a merge is the same
    and `export` is never called. The base is then trained as it is stored, in 16 or 32 bits."""

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that a checkpoint must share to be continued, as JSON; values as in `defaults` are left out."""
        ...

    unmergeable: ClassVar[str | None] = None
    """Why what was learnt cannot become part of the base's weights, as a clause; None if it can."""
    file_names: ClassVar[Collection[str]] = ()
    """The files that `export` makes before the last one, as patterns: a half export has no others, and no whole one
    counts as half.
    """

    @property
    def virtual(self) -> VirtualTokens:
        """The virtual tokens that it adds; most methods have none."""
        return VirtualTokens()

    def mismatches(self, architecture: Architecture) -> list[str]:
        """A sentence for each setting that asks more of the base than it has."""
        return []

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """Name in the model -> shape of every parameter that learns."""
        ...

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        """Make of a sharded base the model that learns: the same start on every rank and at every world size."""
        ...

    def groups(self, model: PreTrainedModel, optim: Optim) -> list[dict[str, Any]]:
        """The optimizer's groups, each with `name`, `params` and `lr_ratio`, a factor on the learning rate."""
        ...

    def switched_off(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """Inside, `model` computes as its base does: the reference of preference losses and of proofs."""
        ...

    def export(self, weights: dict[str, Tensor], model: Model) -> ExportedFiles:
        """Files that other programs load. `weights` by name in the model, in the type of the training's forward pass;
        `model` names the base."""
        ...

    def updates(self, weights: LearntWeights, architecture: Architecture) -> Mapping[str, WeightUpdate]:
        """Name of each weight of the base that a merge changes -> its change; unless `unmergeable`. `weights` are those
        of all that learns, so they may have parameters beside those of the method's own `shapes`."""
        raise AssertionError(self.unmergeable)

    def load_exported(self, model: PreTrainedModel, folder: Path) -> AbstractContextManager[None] | None:
        """Put what the files of `export` hold on the base as transformers made it, by the code that users are given.
        Inside the context that is returned, `model` computes as its base does. None where PEFT reads the files."""
        return None


@dataclass(frozen=True)
class OfSettings(Method):
    """A method whose identity are its settings. The modules that it adds, and those of what learns beside it, have a
    flag `active`; where others learn, it says itself how it is switched off."""

    tuning: Tuning

    groups_by_end: ClassVar[Mapping[str, str]] = {}
    """Name of each of the optimizer's groups -> the end of the names in the model of the parameters in it, without the
    dot before it.
    """

    @property
    def identity(self) -> dict[str, Any]:
        given = self.tuning.model_dump(mode="json", include={"method", *self.settings})
        return without_defaults(given, self.defaults)

    def groups(self, model: PreTrainedModel, optim: Optim) -> list[dict[str, Any]]:
        """LoRA+ (arXiv:2402.12354) lets B learn faster than A; all else learns at the rate of the run."""
        named = list(model.named_parameters())
        return [
            {
                "name": group,
                "lr_ratio": optim.lora_plus_ratio if group == "lora_B" else 1.0,
                "params": [parameter for name, parameter in named if f".{name}".endswith(f".{end}")],
            }
            for group, end in self.groups_by_end.items()
        ]

    def switched_off(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        # A token that was added keeps the row that it started as: the base has none for it.
        return flagged([module for module in model.modules() if "active" in vars(module)], "active", False)


@contextmanager
def flagged(layers: Iterable[Any], flag: str, value: bool) -> Iterator[None]:
    """Every layer's attribute `flag` is `value` inside, and the opposite afterwards."""
    layers = list(layers)
    for layer in layers:
        setattr(layer, flag, value)
    try:
        yield
    finally:
        for layer in layers:
            setattr(layer, flag, not value)


def methods() -> dict[str, Callable[[Tuning], Method]]:
    """Every method of this folder, by the names that `tuning.method` may have."""
    return kinds("trainer.tuning", "METHODS")


def methods_reading(setting: str, tuning: Tuning) -> list[str]:
    """The names of the methods that read a setting, with its section where that is not `tuning`."""
    return [name for name, make in methods().items() if setting in make(tuning).settings]


def find_method(settings: Tuning) -> Method:
    """The method that `tuning.method` names.

    Raises:
        ConfigError: there is none of that name, or a setting has a value that it does not read.
    """
    method = chosen(methods(), "tuning.method", settings.method)(settings)
    if settings.start is not None and method.exports_model:
        raise ConfigError(
            f"tuning.start: tuning.method: {settings.method} has no adapter to begin from. Merge that adapter (capstan"
            " export --format merged), and give the result as model.base."
        )
    refuse_unread(settings, "tuning.method", (*method.settings, "start"))
    return method


def method_of(config: Config) -> Method:
    """The run's method: the one that `tuning.method` names, with what other settings have learn beside it.

    A file of this folder says so by `AROUND`, a function for each such setting, which gets the method and the
    configuration, and returns the method as it is where the setting is not used.

    Raises:
        ConfigError: as `find_method`, or the method cannot have beside it what a setting wants.
    """
    method = find_method(config.tuning)
    for around in kinds("trainer.tuning", "AROUND").values():
        method = around(method, config)
    return method
