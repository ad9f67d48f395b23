"""What an adapter adds to a weight in codes, for a forward pass by the codes that its export will hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.tuning.method import Addition

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Moved:
    """The codes of the weight `name` are moved by `update` (`Moves` of trainer/model/held/held.py)."""

    name: str
    update: Addition

    def change(self, first: int, rows: int, columns: slice = slice(None)) -> Tensor:
        return self.update.change(first, rows, columns)
