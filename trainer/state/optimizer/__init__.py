"""The interface of an optimizer, and how one is found by its name in `optim.name`.

An optimizer is one file in this folder, whose `OPTIMIZERS` maps its name to it. ZeRO-3 gives a rank a flat tensor with
its elements of several parameters, one after the other, so an optimizer updates parts of parameters, and asks the other
ranks for the little that it needs of the rest. Importing the file loads no torch, as `plan` counts on a login node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from trainer.config import Optim
from trainer.config.registry import chosen, kinds, refuse_unread

if TYPE_CHECKING:
    from torch import Tensor

Interval = tuple[int, int]

# Settings of the section `optim` that every optimizer reads, or the schedule and the method beside it.
_COMMON = (
    "lr",
    "schedule",
    "warmup_steps",
    "warmup_ratio",
    "warmup_power",
    "warmup_from",
    "min_lr_ratio",
    "cycles",
    "power",
    "decay_ratio",
    "weight_decay",
    "lora_plus_ratio",
    "modules_ratio",
    "grad_clip",
)


@dataclass(frozen=True)
class State:
    """Values that are kept of a parameter: fp32 or bytes, one for every `block` elements of the flattened tensor.

    If `length` is given, they are a vector of so many values instead, which every rank has whole.
    """

    name: str
    dtype: Literal["F32", "U8"] = "F32"
    block: int = 1
    length: int | None = None

    @property
    def item(self) -> int:
        """Bytes of a value."""
        return 4 if self.dtype == "F32" else 1

    def size(self, numel: int) -> int:
        """Values of a parameter with `numel` elements."""
        return -(-numel // self.block) if self.length is None else self.length

    def held(self, begin: int, end: int) -> Interval:
        """The values that a rank with the elements [begin, end) has: those of blocks that a border cuts are on both
        sides.
        """
        if self.length is not None:
            return 0, self.length
        return begin // self.block, -(-end // self.block) if begin < end else begin // self.block


MASTER = State("master")
"""The fp32 weight, which is kept whatever the optimizer."""


@dataclass
class FlatPart:
    """Elements [begin, end) of a flattened parameter of `shape`, which lie at `offset` in a rank's flat tensor.

    Every rank has `share` elements of it, but for the last ones. `states` has the rank's values of each state, 1-D, by
    name.
    """

    shape: tuple[int, ...]
    share: int
    begin: int
    end: int
    offset: int
    states: dict[str, Tensor] = field(default_factory=dict)

    def of(self, flat: Tensor) -> Tensor:
        return flat[self.offset : self.offset + self.end - self.begin]


@dataclass
class Flat:
    """One rank's flat fp32 tensor and its parts. `whole` has the states that are a tensor of the same length."""

    values: Tensor
    parts: Sequence[FlatPart]
    whole: dict[str, Tensor] = field(default_factory=dict)


Reduce = Callable[["Tensor", Literal["sum", "max"]], None]
"""An all-reduce of an fp32 tensor, wherever it lies, in place. Collective."""


class Optimizer(Protocol):
    """A way to turn gradients into updates."""

    settings: ClassVar[Collection[str]]
    """The settings of the section `optim` that it reads beside the common ones. A value for any other is refused."""

    def states(self, shape: tuple[int, ...]) -> tuple[State, ...]:
        """The states that it keeps of a parameter of `shape`, beside the fp32 weight. Before the first step they are
        zeros.
        """
        ...

    def step_bytes(self, portion: int, largest: int, on_gpu: bool) -> int:
        """The memory that an update takes beside the states, with the fp32 copy of the gradient. A rank updates
        `portion` elements at a time; `largest` is its part of the largest parameter."""
        ...

    def update(self, flat: Flat, gradient: Tensor, settings: Mapping[str, Any], step: int, reduce: Reduce) -> None:
        """Take step number `step`, from 1, in place. `settings` are those of the parameters' group, `lr` for this step.

        Collective: every rank has the same parameters, in the same order.
        """
        ...


def adamw_step(weights: Tensor, first: Tensor, second: Tensor, settings: Mapping[str, Any], step: int) -> None:
    """AdamW's step number `step` by both moments, in place, without its decay."""
    beta1, beta2 = settings["betas"]
    root = second.sqrt().div_(math.sqrt(1 - beta2**step)).add_(settings["eps"])
    weights.addcdiv_(first, root, value=-settings["lr"] / (1 - beta1**step))


def optimizers() -> dict[str, Optimizer]:
    """Every optimizer of this folder, by the names that `optim.name` may have."""
    return kinds("trainer.state.optimizer", "OPTIMIZERS")


def find_optimizer(settings: Optim) -> Optimizer:
    """The optimizer that `optim.name` names.

    Raises:
        ConfigError: there is none of that name, or a setting has a value that it does not read.
    """
    found = chosen(optimizers(), "optim.name", settings.name)
    refuse_unread(settings, "optim.name", (*_COMMON, *found.settings))
    return found


def states_by_name(name: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[State, ...]]:
    """The states that the optimizer called `name` keeps of each parameter with these shapes, the fp32 weight first.

    Raises:
        ConfigError: there is no optimizer of that name.
    """
    kind = chosen(optimizers(), "optim.name", name)
    return {parameter: (MASTER, *kind.states(tuple(shape))) for parameter, shape in shapes.items()}
