"""A place in the order of a run's data. This module does not import torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Position:
    """The place where a global step begins: a bin of a window of an epoch.

    It does not depend on ranks, and a checkpoint stores it. `chapter` counts the chapters in the epoch's order; nearly
    every data set has only one.
    """

    epoch: int = 0
    window: int = 0
    bin: int = 0
    chapter: int = 0

    def to_json(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, int]) -> "Position":
        return cls(**value)
