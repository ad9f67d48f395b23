"""Weights in codes that can be edited in place: a change moves codes, and scales stay as they are.

So a file of the base keeps its header and its length, and only bytes of codes differ. trainer/model/held/dither.py
decides which. A tensor that stands for such a weight is `Movable`.
"""

from collections.abc import Callable, Iterator
from typing import ClassVar, Protocol, runtime_checkable

from torch import Tensor

from trainer.model.held.codes import Numbers
from trainer.store.safetensors_index import StoredTensor, TensorSource

AT_ONCE = 2**18
"""The usual number of weights whose codes a thread moves at once. Each needs some 40 bytes meanwhile."""


class MatrixChange(Protocol):
    """How the weights of a stored tensor change. They are a matrix, or a stack of matrices one below another."""

    def of_rows(self, first: int, count: int, values: Callable[[], Tensor]) -> Tensor:
        """Return the change of some rows, fp32 (count, columns). `values` makes the weights themselves, fp32, if
        needed."""
        ...

    def of_columns(self, matrix: int, first: int, last: int) -> Tensor:
        """Return the change of the columns [first, last) of a matrix, fp32 (last - first, rows)."""
        ...

    @property
    def at_once(self) -> int:
        """The number of weights whose codes a thread moves at once."""
        ...

    def moved(
        self, numbers: Numbers, codes: Tensor, steps: Tensor, scales: Tensor, rows: Tensor, columns: Tensor
    ) -> Tensor:
        """Return the codes of weights that had `codes` and should move by `steps` of their scales, all of them (rows,
        columns). `rows` and `columns` are the numbers of these."""
        ...

    def thresholds(self, rows: Tensor, columns: Tensor) -> Tensor | None:
        """Return the thresholds of trainer/model/held/dither.py at these places, (rows, columns). None rounds to the
        nearest code."""
        ...


@runtime_checkable
class Movable(StoredTensor, Protocol):
    """A weight whose codes can be moved. A unit is a run of bytes of its codes that are moved together."""

    by_columns: ClassVar[bool]
    """Whether a unit has the weights of some columns. Otherwise it is a row."""

    @property
    def codes(self) -> TensorSource: ...

    @property
    def unit(self) -> int:
        """The bytes of a unit."""
        ...

    def move(self, units: Tensor, first: int, change: MatrixChange) -> int:
        """Move the codes of units (n, unit), uint8, in place; `first` is the number of the first one.

        Returns how many codes have changed. It reads scales, so it raises the store's errors.
        """
        ...


def portions(
    count: int, weights: int, largest: Callable[[int], int] = lambda first: 2**62, at_once: int | None = None
) -> Iterator[tuple[int, int]]:
    """Divide [0, count) units, each of so many `weights`, into portions that are moved at once.

    `largest` gives a bound on the portion that begins at a unit. `at_once` weights are moved at once.
    """
    first, step = 0, max(1, (at_once or AT_ONCE) // weights)
    while first < count:
        last = min(count, first + min(step, largest(first)))
        yield first, last
        first = last
