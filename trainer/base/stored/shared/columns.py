"""Decodes a matrix whose transpose is stored in 4 or 8 bits, packed into int32, as in GPTQ and AWQ.

The codes of one row of the matrix are scattered over the whole tensor, so a process that reads some rows reads all
codes once. The codes of a row of the transpose lie together: ranks read such rows, and exchange what they need
(trainer/base/partitions/filling.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.base.stored.shared.cached_values import LastReads
from trainer.base.stored.shared.coded import SCALES, Floats, write_as
from trainer.base.stored.shared.moving import MatrixChange, portions
from trainer.model.held import dither
from trainer.store.safetensors_index import DTYPE_BYTES, TensorSource, numel

# The number of weights that each reading thread decodes at once.
_AT_ONCE = 2**18
# A multiple of the number of codes in an int32.
_ROWS = 8
_SHARED = 128


@dataclass(frozen=True)
class PackedColumns:
    """The values of a matrix (outputs, inputs): (code - zero) * scale, in the type of the scales.

    `codes` are packed along the inputs, (inputs / codes an int32, outputs), or along the outputs with `along_outputs`.
    `zeros` (groups, outputs / codes an int32) are packed along the outputs, and `more` is added to them. `scales` are
    (groups, outputs). A group is `group` consecutive inputs, or the inputs to which `group_of` gives its number.
    `order` gives the shift of each code in an int32 along the outputs.
    """

    codes: TensorSource
    zeros: TensorSource
    scales: TensorSource
    shape: tuple[int, int]
    bits: int
    group: int
    last_reads: LastReads
    order: tuple[int, ...]
    more: int = 0
    along_outputs: bool = False
    group_of: TensorSource | None = None

    by_columns: ClassVar[bool] = True

    @property
    def dtype(self) -> str:
        return self.scales.dtype

    def read(self, begin: int, end: int) -> bytearray:
        (outputs, inputs), item = self.shape, DTYPE_BYTES[self.dtype]
        data = bytearray(item * (end - begin))
        step = max(_ROWS, _AT_ONCE // inputs // _ROWS * _ROWS)
        for first in range(begin // inputs // _ROWS * _ROWS, -(-end // inputs), step):
            last = min(outputs, first + step)
            values = self._rows(first, last).reshape(-1)
            low, high = max(begin, first * inputs), min(end, last * inputs)
            write_as(values[low - first * inputs : high - first * inputs].copy(), self.dtype, data, low - begin)
        return data

    @property
    def transpose(self) -> "_Transpose":
        return _Transpose(self)

    @property
    def together(self) -> int:
        """The inputs that share scales, or enough that scales are small beside the codes. Always whole int32."""
        return -(-min(self.group, _SHARED) // _ROWS) * _ROWS

    @property
    def unit(self) -> int:
        return 4 * self.codes.shape[1]

    def move(self, units: Tensor, first: int, change: MatrixChange) -> int:
        """As `Movable`: a unit is a row of int32, which has one input with AWQ, and several with GPTQ."""
        outputs, numbers = torch.arange(self.shape[0]), "int4" if self.bits == 4 else "offset8"
        each, differing = 1 if self.along_outputs else 32 // self.bits, 0
        for begin, end in portions(len(units), each * len(outputs)):
            low, high = (first + begin) * each, (first + end) * each
            codes = self._unpacked(units[begin:end])
            group = self._groups(low, high, _only)
            lowest = int(group.min())
            by = SCALES[self.dtype](_only(self.scales, lowest, int(group.max()) + 1)).reshape(-1, len(outputs))
            at = change.thresholds(outputs, torch.arange(low, high))
            steps = change.of_columns(0, low, high) / torch.from_numpy(by[group - lowest])
            found = dither.moved(numbers, codes, steps, None if at is None else at.T)
            differing += int(found.ne(codes).sum())
            units[begin:end] = self._packed(found)
        return differing

    def _unpacked(self, units: Tensor) -> Tensor:
        """Rows of int32 as bytes -> codes (inputs, outputs), uint8."""
        words = units.contiguous().view(torch.int32)
        if self.along_outputs:
            return words[..., None].bitwise_right_shift(self._shifts).bitwise_and(2**self.bits - 1).byte().flatten(1)
        return (
            words[:, None].bitwise_right_shift(self._shifts[:, None]).bitwise_and(2**self.bits - 1).byte().flatten(0, 1)
        )

    def _packed(self, codes: Tensor) -> Tensor:
        """The inverse of `_unpacked`."""
        each = len(self.order)
        if self.along_outputs:
            parts = codes.int().unflatten(1, (-1, each)).bitwise_left_shift(self._shifts)
            return parts.sum(-1, dtype=torch.int32).view(torch.uint8)
        parts = codes.int().unflatten(0, (-1, each)).bitwise_left_shift(self._shifts[:, None])
        return parts.sum(1, dtype=torch.int32).view(torch.uint8)

    @property
    def _shifts(self) -> Tensor:
        """The shifts of the codes in an int32. AWQ has them along the outputs in an order of its own."""
        along = self.order if self.along_outputs else tuple(range(0, 32, self.bits))
        return torch.tensor(along, dtype=torch.int32)

    def _rows(self, first: int, last: int) -> Floats:
        """Return the values of the outputs [first, last), (last - first, inputs)."""
        group = self._groups(0, self.shape[1], self._whole)
        return np.ascontiguousarray(self._block(0, self.shape[1], first, last, group, self._whole).T)

    def of_inputs(self, first: int, last: int) -> Floats:
        """Return the values of the inputs [first, last), (last - first, outputs)."""
        group = self._groups(first, last, _only)
        return self._block(first, last, 0, self.shape[0], group, _only)

    def _block(self, begin: int, end: int, first: int, last: int, group: NDArray[np.int32], rows: "_Rows") -> Floats:
        """The values of the inputs [begin, end), whose groups are `group`, and the outputs [first, last).

        `rows` reads rows of a tensor.
        """
        each, low = 32 // self.bits, int(group.min())
        if self.along_outputs:
            codes = self._along_outputs(_words(rows(self.codes, begin, end), self.codes), first, last)
        else:
            words = _words(rows(self.codes, begin // each, -(-end // each)), self.codes)
            part = words[:, None, first:last] >> np.arange(0, 32, self.bits, dtype=np.uint32)[:, None]
            codes = (part & self._mask).reshape(-1, last - first)[begin % each :][: end - begin]
        high = int(group.max()) + 1
        zeros = self._along_outputs(_words(rows(self.zeros, low, high), self.zeros), first, last)
        by = SCALES[self.dtype](rows(self.scales, low, high)).reshape(-1, self.shape[0])[:, first:last]
        values = codes.astype(np.float32)
        values -= (zeros.astype(np.float32) + np.float32(self.more))[group - low]
        values *= by[group - low]
        return values

    def _along_outputs(self, words: NDArray[np.uint32], first: int, last: int) -> NDArray[np.uint32]:
        """The codes of the outputs [first, last), from words that hold several outputs."""
        each = 32 // self.bits
        part = words[:, first // each : -(-last // each), None] >> np.array(self.order, np.uint32)
        return (part & self._mask).reshape(len(words), -1)[:, first % each :][:, : last - first]

    @property
    def _mask(self) -> np.uint32:
        return np.uint32(2**self.bits - 1)

    def _groups(self, first: int, last: int, rows: "_Rows") -> NDArray[np.int32]:
        """The group of each of these inputs."""
        if self.group_of is None:
            return np.arange(first, last, dtype=np.int32) // np.int32(self.group)
        return np.frombuffer(rows(self.group_of, first, last), np.int32)

    def _whole(self, source: TensorSource, first: int, last: int) -> memoryview:
        """Rows of a tensor that is read as a whole, only once."""
        data = memoryview(self.last_reads.read(source, 0, numel(source)))
        row = len(data) // source.shape[0]
        return data[first * row : last * row]


_Rows = Callable[[TensorSource, int, int], bytearray | memoryview]
"""The bytes of the rows [first, last) of a tensor."""


def _only(source: TensorSource, first: int, last: int) -> bytearray:
    """Read only these rows."""
    width = numel(source) // source.shape[0]
    return source.read(first * width, last * width)


def _words(data: bytearray | memoryview, source: TensorSource) -> NDArray[np.uint32]:
    return np.frombuffer(data, np.uint32).reshape(-1, source.shape[1])


@dataclass(frozen=True)
class _Transpose:
    """The values of the transpose, (inputs, outputs)."""

    of: PackedColumns

    @property
    def shape(self) -> tuple[int, int]:
        return self.of.shape[1], self.of.shape[0]

    @property
    def dtype(self) -> str:
        return self.of.dtype

    def read(self, begin: int, end: int) -> bytearray:
        outputs, item = self.of.shape[0], DTYPE_BYTES[self.dtype]
        data = bytearray(item * (end - begin))
        first = begin // outputs
        values = self.of.of_inputs(first, -(-end // outputs)).reshape(-1)
        write_as(values[begin - first * outputs : end - first * outputs].copy(), self.dtype, data, 0)
        return data
