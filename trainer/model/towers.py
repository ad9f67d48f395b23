"""The tower can learn. ZeRO-3 divides what learns like all else that learns, and it is lent to the frozen tower.

The tower is outside of ZeRO-3, and a rank whose rows have no picture does not call it. What learns there must be
gathered, and its gradients reduced, on all ranks alike. So it is the parameters of a module of the language model, and
every pass calls it first, whatever its rows have:

    parameters -> lent, whole -> layers of the tower -> features -> states of the row -> decoder
                      |                                                  ^
                      +---- 0 x one of their values ---------------------+     also where nothing is seen

So a rank without pictures adds zeros to the gradients, in the place of the backward pass where the others add theirs.

Adapters are lent to linear layers. A weight that learns whole lends its change: the tower keeps the base's weight, so
it computes as the base does while nothing is lent to it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

SEEING = "seeing"
"""The name in the language model of the module with what learns."""


def parameter_name(path: str, kind: str) -> str:
    """The name in the language model of what learns at `path` in the whole class: a matrix of an adapter (`lora_A` or
    `lora_B`) for a layer, or the change of a module's parameter."""
    return f"{SEEING}.{path.replace('.', '/')}/{kind}"


def seeing_name(name: str) -> str:
    """Marks a name in the whole class among those of the language model."""
    return f"{SEEING}.{name}"


class Lent(NamedTuple):
    """`values` is what learns, whole for a pass, by the names of `parameter_name` without the first part."""

    values: Mapping[str, Tensor]
    training: bool

    def joined(self, states: Tensor) -> Tensor:
        """The states of a row's tokens, which depend on what is lent and have the same values."""
        return states + 0 * next(iter(self.values.values())).flatten()[0]


class Borrowing(Protocol):
    """The places of a whole class that something is lent to."""

    def using(self, lent: Lent) -> AbstractContextManager[None]:
        """Inside, the class computes with it."""
        ...


class Lender(nn.Module):
    """A module that has what learns, by the names of `parameter_name`.

    While it is not `active` the base's tower computes.
    """

    def __init__(self, values: Mapping[str, Tensor], borrowing: Callable[[nn.Module], Borrowing]) -> None:
        """`borrowing` prepares the whole class for it."""
        super().__init__()
        self.active, self.borrowing = True, borrowing
        for name, value in values.items():
            self.register_parameter(name.removeprefix(f"{SEEING}."), nn.Parameter(value))

    def forward(self) -> tuple[Tensor, ...]:
        """All of them, whole. ZeRO-3 frees the parameters themselves behind the call."""
        return _Copied.apply(*self.parameters())  # type: ignore[return-value]

    def lent(self) -> Lent | None:
        """Return what is lent for a pass. All ranks call it together."""
        if not self.active:
            return None
        return Lent(dict(zip(self._parameters, self(), strict=True)), self.training)


class _Copied(torch.autograd.Function):
    """All gradients come at once, zeros for what a pass did not use. So they are reduced in one order on every rank."""

    @staticmethod
    def forward(_ctx: Any, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.clone() for value in values)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


class _Matrices(NamedTuple):
    """An adapter: A (rank, inputs) and B (outputs, rank), and the share of its inputs that is dropped."""

    down: Tensor
    up: Tensor
    dropout: float


class Adapted(nn.Module):
    """A frozen linear layer of the tower. It adds scaling * B A x while an adapter is lent to it."""

    def __init__(self, base: nn.Linear, scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        self.given: _Matrices | None = None

    @property
    def weight(self) -> Tensor:
        """Towers look at the type of the weight."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        if self.given is None:
            return result
        inputs = nn.functional.dropout(x, self.given.dropout) if self.given.dropout else x
        low = nn.functional.linear(inputs.to(self.given.down.dtype), self.given.down)
        return result + (nn.functional.linear(low, self.given.up) * self.scaling).to(result.dtype)


class AdaptedLayers:
    """The linear layers of a whole class that adapters are lent to."""

    def __init__(self, paths: Iterable[str], scaling: float, dropout: float, whole: nn.Module) -> None:
        self._layers, self._dropout = dict[str, Adapted](), dropout
        for path in paths:
            base = whole.get_submodule(path)
            assert type(base) is nn.Linear
            self._layers[path] = Adapted(base, scaling)
            whole.set_submodule(path, self._layers[path])

    @contextmanager
    def using(self, lent: Lent) -> Iterator[None]:
        for path, layer in self._layers.items():
            place = path.replace(".", "/")
            down, up = (lent.values[f"{place}/{kind}"] for kind in ("lora_A", "lora_B"))
            layer.given = _Matrices(down, up, self._dropout if lent.training else 0.0)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.given = None


class ChangedWeights:
    """The parameters of modules of a whole class, by their names in it, that changes are lent to."""

    def __init__(self, modules: Mapping[str, Iterable[str]], whole: nn.Module) -> None:
        """`modules` has names below the path of each module."""
        self._places = dict[str, tuple[dict[str, Any], str, Tensor]]()
        for path, names in modules.items():
            for name in names:
                owner, _, leaf = f"{path}.{name}".rpartition(".")
                held: dict[str, Any] = whole.get_submodule(owner)._parameters
                place = parameter_name(path, name.replace(".", "/")).removeprefix(f"{SEEING}.")
                self._places[place] = held, leaf, held[leaf]

    @contextmanager
    def using(self, lent: Lent) -> Iterator[None]:
        for name, (held, leaf, base) in self._places.items():
            held[leaf] = base + lent.values[name].to(base.dtype)
        try:
            yield
        finally:
            for held, leaf, base in self._places.values():
                held[leaf] = base
