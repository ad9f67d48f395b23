"""The interface of a fine-tuning method, the lookup of a method by its name in `tuning.method`, and the base class of
a method that wraps another one and trains more parameters beside it.

A method is one file here, or a folder whose layers lie beside its `__init__.py`. Its `METHODS` maps each name that
`tuning.method` may have to a function that makes the method from the section's settings. A file without `METHODS` holds
code that several methods share. Importing the file must not load torch, because `plan` runs on a login node: code that
handles tensors imports torch when it is called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from trainer.config.registry import chosen, kinds, refuse_unread, without_defaults
from trainer.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from trainer.base.architecture import Architecture
    from trainer.config import Config, Model, Optim, Tuning
    from trainer.state.checkpoint.learnt_weights import LearntWeights


# Settings outside the section `tuning` that only some methods read.
OPTIM_OF_SOME = ("optim.lora_plus_ratio",)


class WeightUpdate(Protocol):
    """The change that a merge makes to one weight of the base. The weight is seen as a matrix (-1, shape[-1])."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def apply_to(self, rows: Tensor, first: int) -> None:
        """Change whole rows of the weight in place. They come flat, as they are stored; the computation is in fp32.

        `first` is the number of the first of these rows."""
        ...


@runtime_checkable
class Addition(WeightUpdate, Protocol):
    """An update that adds the same matrix to any weight."""

    def change(self, first: int, rows: int, columns: slice = slice(None)) -> Tensor:
        """Some rows of that matrix, or their `columns`, (rows, columns) fp32: the same bits on every device, by
        `exact_product`."""
        ...


def exact_product(up: Tensor, down: Tensor, scaling: float) -> Tensor:
    """Return scaling * up @ down, fp32: the same bits on every device.

    The forward passes of a training and an export as stored decide with it which codes move, perhaps on different
    devices. Sums in fp32 depend on their order: on a GPU some of a thousand million codes would be others. Therefore
    the sums are in fp64, and rounded once. A product of two bf16 numbers has 16 bits, so sums of some hundred of them
    are exact in fp64 unless their sizes differ by more than a factor of 2^28. All that follows is elementwise and
    rounded as IEEE 754 says. So an export need not read the codes of the last forward pass: it makes them. If the
    matrices are in fp32, the last bit of fp64 may depend on the order. That moves another code in fewer than one of
    10^14 weights. A power of two is multiplied into `up`, which changes no bit.
    """
    if math.frexp(scaling)[0] == 0.5:
        return (up.double() * scaling @ down.double()).float()
    return (up.double() @ down.double()).mul_(scaling).float()


@dataclass(frozen=True)
class Moved:
    """The codes of the weight `name` are moved by `update` (`Moves` of trainer/model/held/__init__.py)."""

    name: str
    update: Addition

    def change(self, first: int, rows: int, columns: slice = slice(None)) -> Tensor:
        return self.update.change(first, rows, columns)


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
    """The files of an export, without those of the tokenizer.

    `library` is the program that loads them. `what` names them at the beginning of a sentence. `files` are in the order
    in which they are written; nothing loads without the last one."""

    library: str
    what: str
    files: dict[str, bytes]


@dataclass(frozen=True)
class VirtualTokens:
    """`count` learnt tokens that stand before the first token of each document.

    With `in_row` they take the first positions of the document in its packed row. Otherwise they lie beside the row as
    keys and values. `refused_kernels` maps each attention kernel that cannot compute with them to the reason, a clause.
    """

    count: int = 0
    in_row: bool = False
    refused_kernels: Mapping[str, str] = field(default_factory=dict)

    @property
    def reserved(self) -> int:
        """Positions of a packed row before each document."""
        return self.count if self.in_row else 0

    def longest(self, positions: int | None) -> int | None:
        """The longest text, in tokens, that fits behind them in a base with `positions`; None if there is no limit."""
        return positions - self.count if positions else None


class Method(Protocol):
    """A fine-tuning method with the settings of one run. The defaults hold for most methods; a class overrides some."""

    settings: ClassVar[Collection[str]] = ()
    """The settings of the section `tuning` that the method reads, and those of `OPTIM_OF_SOME` with their section.

    Capstan refuses a value for any other setting, because it would be ignored. `method_of` does the same for settings
    of what learns beside a method."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """The value of a key that an identity lacks.

    A key that is added later gets a default here, so that older checkpoints keep their identity. A default here never
    changes, even when the default in the configuration does."""
    trains_base: ClassVar[bool] = False
    """Whether parameters of the base learn. One copy of them is then divided over all ranks."""
    counts_activations: ClassVar[bool] = False
    """Whether `plan` can count all activations that a layer keeps for its backward pass.

    If not, `plan` assumes that every layer is recomputed, and `train.activation_checkpointing: auto` recomputes it."""
    adapts_4_bits: ClassVar[bool] = False
    """Whether the program that loads an export can put it over bitsandbytes' 4-bit layers.

    If not, `--verify` gives that program the dequantized weights in 16 bits."""
    exports_model: ClassVar[bool] = False
    """Whether an export is the whole model: the base's own files with `updates` applied.

    A merge then gives the same files, and nobody calls `export`. The base is trained as it is stored, in 16 or 32
    bits."""

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that must equal a checkpoint's to resume from it, as JSON, without those equal to `defaults`."""
        ...

    @property
    def through(self) -> bool:
        """Whether forward passes compute by the codes that an export as stored writes."""
        return False

    unmergeable: ClassVar[str | None] = None
    """Why a merge into the base's weights is impossible, as a clause; None if it is possible."""
    file_names: ClassVar[Collection[str]] = ()
    """Patterns of the files that `export` writes before the last one.

    A folder with no other files is an incomplete export. A complete export never matches, because it has the last file.
    """

    @property
    def virtual(self) -> VirtualTokens:
        """The virtual tokens that the method adds; most methods add none."""
        return VirtualTokens()

    def mismatches(self, architecture: Architecture) -> list[str]:
        """One sentence for each setting that asks for something that the base does not have."""
        return []

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """Name in the model -> shape of every parameter that learns."""
        ...

    def attach(self, model: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, seed: int) -> None:
        """Add the trained parameters to a sharded base. They start equal on every rank and at every world size."""
        ...

    def sees(self, architecture: Architecture) -> dict[str, Any] | None:
        """Return how the tower learns (`SeesAndLearns` of trainer/base/find/check.py, without the run's type
        and kernel), or None if it does not."""
        return None

    def groups(self, model: PreTrainedModel, optim: Optim) -> list[dict[str, Any]]:
        """The optimizer's groups. Each has `name`, `params` and `lr_ratio`, a factor on the learning rate."""
        ...

    def switched_off(self, model: PreTrainedModel) -> AbstractContextManager[None]:
        """A context in which `model` computes as its base does. Preference losses and proofs use it as reference."""
        ...

    def export(self, weights: dict[str, Tensor], model: Model) -> ExportedFiles:
        """The files that other programs load.

        `weights` maps names in the model to tensors in the type of the training's forward pass. `model` names the
        base."""
        ...

    def updates(self, weights: LearntWeights, architecture: Architecture) -> Mapping[str, WeightUpdate]:
        """Name of each weight of the base that a merge changes -> its change. Never called if `unmergeable`.

        `weights` holds every trained parameter, so it may hold more than the method's own `shapes`."""
        raise AssertionError(self.unmergeable)

    def load_exported(self, model: PreTrainedModel, folder: Path) -> AbstractContextManager[None] | None:
        """Load the files of `export` onto the base that transformers built, with the loader that the user also gets.

        Inside the returned context `model` computes as its base does. Returns None where PEFT reads the files."""
        return None


@dataclass(frozen=True)
class MethodOfSettings(Method):
    """A method whose identity is its settings.

    Each module that it adds, or that learns beside it, has a flag `active`. A method that trains other modules
    overrides `switched_off`."""

    tuning: Tuning

    groups_by_end: ClassVar[Mapping[str, str]] = {}
    """Name of an optimizer group -> the end of its parameters' names in the model, without the leading dot."""

    @property
    def identity(self) -> dict[str, Any]:
        given = self.tuning.model_dump(mode="json", include={"method", *self.settings})
        return without_defaults(given, self.defaults)

    def groups(self, model: PreTrainedModel, optim: Optim) -> list[dict[str, Any]]:
        """LoRA+ (arXiv:2402.12354) gives B a higher learning rate than A. All other groups use the run's rate."""
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
        # An added token falls back to the row that it started with, because the base has no row for it.
        return flagged([module for module in model.modules() if "active" in vars(module)], "active", False)


@contextmanager
def flagged(layers: Iterable[Any], flag: str, value: bool) -> Iterator[None]:
    """Set every layer's attribute `flag` to `value` inside the context, and to the opposite afterwards."""
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
    """The names of the methods that read a setting. The setting is given with its section if that is not `tuning`."""
    return [name for name, make in methods().items() if setting in make(tuning).settings]


def find_method(settings: Tuning) -> Method:
    """The method that `tuning.method` names.

    Raises:
        ConfigError: no method has that name, or a setting has a value that the method does not read.
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
    """The run's method: the one that `tuning.method` names, wrapped by what other settings train beside it.

    A file of this folder may have `AROUND`, with one function for each such setting. The function gets the method and
    the configuration. It returns the method unchanged if the setting is not used.

    Raises:
        ConfigError: as `find_method`, or the method cannot be combined with such a setting.
    """
    method = find_method(config.tuning)
    for around in kinds("trainer.tuning", "AROUND").values():
        method = around(method, config)
    return method


class _AsTheMethod:
    """An attribute of a wrapper that forwards to the wrapped method."""

    def __set_name__(self, _owner: type, name: str) -> None:
        self._name = name

    def __get__(self, around: Around, _owner: type) -> Any:
        return getattr(around.method, self._name)


@dataclass(frozen=True)
class Around(Method):
    """A method that wraps another one and trains more parameters.

    A subclass says what it adds: to the parameters (`own`), to PEFT's folder (`added_to`), and to a merge
    (`own_updates`) unless it is unmergeable.
    """

    method: Method

    settings: ClassVar[Any] = _AsTheMethod()
    defaults: ClassVar[Any] = _AsTheMethod()
    trains_base: ClassVar[Any] = _AsTheMethod()
    counts_activations: ClassVar[Any] = _AsTheMethod()
    adapts_4_bits: ClassVar[Any] = _AsTheMethod()
    exports_model: ClassVar[Any] = _AsTheMethod()
    unmergeable: ClassVar[Any] = _AsTheMethod()
    file_names: ClassVar[Any] = _AsTheMethod()
    identity: ClassVar[Any] = _AsTheMethod()
    virtual: ClassVar[Any] = _AsTheMethod()
    through: ClassVar[Any] = _AsTheMethod()
    mismatches: ClassVar[Any] = _AsTheMethod()
    attach: ClassVar[Any] = _AsTheMethod()
    groups: ClassVar[Any] = _AsTheMethod()
    switched_off: ClassVar[Any] = _AsTheMethod()
    load_exported: ClassVar[Any] = _AsTheMethod()
    sees: ClassVar[Any] = _AsTheMethod()

    def own(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        """Name in the model -> shape of every parameter that it trains beside those of the method."""
        raise NotImplementedError

    def shapes(self, architecture: Architecture) -> dict[str, tuple[int, ...]]:
        return {**self.method.shapes(architecture), **self.own(architecture)}

    def export(self, weights: dict[str, Tensor], model: Model) -> ExportedFiles:
        """PEFT's folder of the method, with the parameters of the wrapper added."""
        from trainer.base.find.locate import describe_base

        architecture = describe_base(model).architecture
        own = self.own(architecture)
        theirs = self.method.export({name: values for name, values in weights.items() if name not in own}, model)
        return self.added_to(theirs, {name: values for name, values in weights.items() if name in own}, architecture)

    def added_to(self, theirs: ExportedFiles, ours: dict[str, Tensor], architecture: Architecture) -> ExportedFiles:
        """Add the weights `ours`, by name in the model, to `theirs`, PEFT's folder of the method."""
        raise NotImplementedError

    def updates(self, weights: LearntWeights, architecture: Architecture) -> dict[str, WeightUpdate]:
        return {**self.method.updates(weights, architecture), **self.own_updates(weights, architecture)}

    def own_updates(self, weights: LearntWeights, architecture: Architecture) -> Mapping[str, WeightUpdate]:
        """The changes that the wrapper adds to the method's in a merge."""
        raise NotImplementedError


def innermost(method: Method) -> Method:
    """The method itself, without its wrappers."""
    return innermost(method.method) if isinstance(method, Around) else method
