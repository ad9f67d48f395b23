"""Adapters of the part that sees learn. ZeRO-3 divides them like all that learns, and they are lent to a frozen tower.

The tower is outside of ZeRO-3, and a rank whose rows have no picture does not call it. Its adapters must be gathered,
and their gradients reduced, on all ranks alike. So they are parameters of a module of the language model, and every
pass calls it first, whatever its rows have:

    adapters -> lent, whole -> layers of the tower -> features -> states of the row -> decoder
                     |                                                  ^
                     +---- 0 x one of their values ---------------------+     also where nothing is seen

A rank without pictures so adds zeros to the gradients, in the place of the backward pass where the others add theirs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SEEING = "seeing"
"""The name in the language model of the module with the adapters."""


class Matrices(NamedTuple):
    """An adapter: A (rank, inputs) and B (outputs, rank)."""

    down: Tensor
    up: Tensor


def parameter_name(path: str, kind: str) -> str:
    """The name in the language model of a matrix (`lora_A` or `lora_B`) for the layer at `path` in the whole class."""
    return f"{SEEING}.{path.replace('.', '/')}/{kind}"


class Lent(NamedTuple):
    """The adapters of a pass, by the path of their layer in the whole class."""

    matrices: Mapping[str, Matrices]
    scaling: float
    dropout: float

    def joined(self, states: Tensor) -> Tensor:
        """The states of a row's tokens, which depend on the adapters and have the same values."""
        (one, *_) = self.matrices.values()
        return states + 0 * one.down.flatten()[0]


class Adapters(nn.Module):
    """The matrices of layers, by their paths in the whole class. While it is not `active` the base's tower computes."""

    def __init__(self, matrices: Mapping[str, Matrices], scaling: float, dropout: float) -> None:
        super().__init__()
        self.active, self._paths = True, list(matrices)
        self._scaling, self._dropout = scaling, dropout
        for path, one in matrices.items():
            for kind, values in (("lora_A", one.down), ("lora_B", one.up)):
                _, _, name = parameter_name(path, kind).partition(".")
                self.register_parameter(name, nn.Parameter(values))

    @property
    def paths(self) -> list[str]:
        return self._paths

    def forward(self) -> tuple[Tensor, ...]:
        """A and B of each path, whole. ZeRO-3 frees the parameters themselves behind the call."""
        return _Copied.apply(*self.parameters())  # type: ignore[return-value]

    def lent(self) -> Lent | None:
        """Those of a pass. Collective."""
        if not self.active:
            return None
        values = self()
        pairs = zip(values[::2], values[1::2], strict=True)
        matrices = {path: Matrices(*pair) for path, pair in zip(self._paths, pairs, strict=True)}
        return Lent(matrices, self._scaling, self._dropout if self.training else 0.0)


class _Copied(torch.autograd.Function):
    """All gradients come at once, zeros for what a pass did not use. So they are reduced in one order on every rank."""

    @staticmethod
    def forward(_ctx: Any, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(value.clone() for value in values)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads


class Borrower(nn.Module):
    """A frozen linear layer of the tower. It adds scaling * B A x while an adapter is lent to it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.given: Matrices | None = None
        self.scaling = self.dropout = 0.0

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
        inputs = nn.functional.dropout(x, self.dropout) if self.dropout else x
        low = nn.functional.linear(inputs.to(self.given.down.dtype), self.given.down)
        return result + (nn.functional.linear(low, self.given.up) * self.scaling).to(result.dtype)


class Borrowers:
    """The layers of a whole class that adapters are lent to."""

    def __init__(self, whole: nn.Module, paths: list[str]) -> None:
        self._layers = dict[str, Borrower]()
        for path in paths:
            base = whole.get_submodule(path)
            assert type(base) is nn.Linear
            self._layers[path] = Borrower(base)
            whole.set_submodule(path, self._layers[path])

    @contextmanager
    def using(self, lent: Lent | None) -> Iterator[None]:
        """Inside, the layers have these adapters."""
        for path, layer in self._layers.items() if lent else ():
            assert lent is not None
            layer.given, layer.scaling, layer.dropout = lent.matrices[path], lent.scaling, lent.dropout
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.given = None
