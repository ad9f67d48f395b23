"""The common part of what learns beside a method's own: a method around another one.

This module is no method: it has no `METHODS`. A file of this folder whose `AROUND` names a setting puts such a method around the
run's where that is set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.tuning.method import LearntWeights, Method

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Around:
    """A method with something more that learns. What it does not say itself is said by its method."""

    method: Method

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)


@dataclass(frozen=True)
class SomeWeights(LearntWeights):
    """Those of `every` with these shapes by name."""

    every: LearntWeights
    names: Mapping[str, tuple[int, ...]]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.names

    def part(self, name: str, begin: int, end: int) -> Tensor:
        return self.every.part(name, begin, end)

    def __getitem__(self, name: str) -> Tensor:
        return self.every[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
