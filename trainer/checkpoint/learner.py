"""The part of a training engine that checkpoints read and write."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class TrainablePartition:
    """This rank's part of one trainable parameter: elements [begin, end) of the flattened tensor, padding left out.

    `states` are live 1-D fp32 views of length end - begin: the master weight and AdamW's two moments.
    """

    name: str
    shape: tuple[int, ...]
    begin: int
    end: int
    states: dict[str, Tensor]


class Learner(Protocol):
    """The object that learns: the engine in a run, a stand-in where a test needs no model."""

    def partitions(self) -> list[TrainablePartition]:
        """This rank's part of everything that learns, as live views: without collectives, in a fixed order."""
        ...

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """The optimizer's groups by name, with the hyperparameters that do not follow from the step."""
        ...

    @property
    def updates(self) -> int:
        """AdamW's step count, which its bias correction depends on."""
        ...

    def refresh(self, updates: int) -> None:
        """After writing into `partitions`: set the step count and whatever is derived from the masters. Collective."""
        ...
