"""The part of a training engine that checkpoints read and write."""

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class TrainablePartition:
    """This rank's part of one trainable parameter: elements [begin, end) of the flattened tensor, without padding.

    `states` are live 1-D views by the names of the optimizer's states, each with the values that the state is held
    with: of the master weight and AdamW's two moments, fp32 and of length end - begin.
    """

    name: str
    shape: tuple[int, ...]
    begin: int
    end: int
    states: dict[str, Tensor]


class Learner(Protocol):
    """What learns: the engine in a run, or a stand-in in tests that need no model."""

    def partitions(self) -> list[TrainablePartition]:
        """This rank's part of everything that learns, as live views, in a fixed order. Not collective."""
        ...

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        """The optimizer's groups by name, with the hyperparameters that do not depend on the step."""
        ...

    @property
    def updates(self) -> int:
        """The optimizer's step count, on which AdamW's bias correction and Adafactor's decay depend."""
        ...

    def refresh(self, updates: int) -> None:
        """Call after writing into `partitions`: sets the step count and everything that is derived from the masters.
        Collective.
        """
        ...
