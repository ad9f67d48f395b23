"""What an adapter adds to a weight in codes, for a forward pass by the codes that its export will hold.

The forward passes of a training and the export decide with the same numbers which codes move, perhaps on different
devices. Sums in fp32 depend on their order: on a GPU some of a thousand million codes would be others. Therefore the
product of the two matrices is summed in fp64 and rounded once. A product of two bf16 numbers has 16 bits, so sums of
some hundred of them are exact in fp64 unless their sizes differ by more than a factor of 2^28. All that follows is
elementwise and rounded as IEEE 754 says. So an export need not read the codes of the last forward pass: it makes them.
With matrices in fp32 the last bit of fp64 may depend on the order. That moves another code in fewer than one of 10^14
weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.tuning.method import Addition

if TYPE_CHECKING:
    from torch import Tensor


def exact_product(up: Tensor, down: Tensor, scaling: float) -> Tensor:
    """Return scaling * up @ down, fp32. The sums are in fp64, so that their order does not show."""
    return (up.double() @ down.double()).mul_(scaling).float()


@dataclass(frozen=True)
class Moved:
    """The codes of the weight `name` are moved by `update` (`Moves` of trainer/model/held/held.py)."""

    name: str
    update: Addition

    def change(self, first: int, rows: int, columns: slice = slice(None)) -> Tensor:
        return self.update.change(first, rows, columns)
