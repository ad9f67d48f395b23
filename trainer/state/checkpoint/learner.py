"""The part of a training engine that checkpoints read and write."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class TrainablePartition:
    """This rank's part of one trainable parameter: elements [begin, end) of the flattened tensor, padding left out.

    `states` are live 1-D views by the names of the optimizer's states, each with the values that the state is held
    with: of the master weight and AdamW's two moments, fp32 and of length end - begin.
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
        """The optimizer's step count, which AdamW's bias correction and Adafactor's decay depend on."""
        ...

    def refresh(self, updates: int) -> None:
        """After writing into `partitions`: set the step count and whatever is derived from the masters. Collective."""
        ...
