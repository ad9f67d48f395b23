"""The values of a matrix whose files have its transpose in 4 or 8 bits, packed into int32: GPTQ's and AWQ's.

A row of the matrix needs bytes from all over the codes, so that a rank which has some rows of a matrix reads all of its codes, once.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.base.stored.shared.cached_values import LastReads
from trainer.base.stored.shared.floats import SCALES, Floats, write_as
from trainer.store.safetensors_index import DTYPE_BYTES, TensorSource, numel

# Weights that are decoded at once, by each thread that reads.
_AT_ONCE = 2**18
# A multiple of the codes that an int32 has.
_ROWS = 8


@dataclass(frozen=True)
class Columns:
    """The values of a matrix (outputs, inputs): (code - zero) * scale, in the type of the scales.

    `codes` are packed along the inputs, (inputs / codes an int32, outputs), or, where `along_outputs`, along the outputs. `zeros` (groups,
    outputs / codes an int32) are packed along the outputs, and one `more` than they say. `scales` are (groups, outputs). A group is
    `group` inputs, or those for which `group_of` has its number. `order` says which shift each code of an int32 along the outputs has.
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

    def _rows(self, first: int, last: int) -> Floats:
        """Those of the outputs [first, last), (last - first, inputs)."""
        words, scales = self._whole(self.codes), SCALES[self.dtype](self._bytes(self.scales))
        if self.along_outputs:
            codes = self._along_outputs(words, first, last)
        else:
            part = words[:, None, first:last] >> np.arange(0, 32, self.bits, dtype=np.uint32)[:, None]
            codes = (part & self._mask).reshape(self.shape[1], last - first)
        zeros = self._along_outputs(self._whole(self.zeros), first, last).astype(np.float32) + np.float32(self.more)
        by = scales.reshape(self.scales.shape)[:, first:last]
        group = self._groups()
        values = codes.astype(np.float32)
        values -= zeros[group]
        values *= by[group]
        return np.ascontiguousarray(values.T)

    def _along_outputs(self, words: NDArray[np.uint32], first: int, last: int) -> NDArray[np.uint32]:
        """The codes of the outputs [first, last), of words that have several side by side."""
        each = 32 // self.bits
        part = words[:, first // each : -(-last // each), None] >> np.array(self.order, np.uint32)
        return (part & self._mask).reshape(len(words), -1)[:, first % each :][:, : last - first]

    @property
    def _mask(self) -> np.uint32:
        return np.uint32(2**self.bits - 1)

    def _groups(self) -> NDArray[np.int32]:
        """The group of each input."""
        if self.group_of is None:
            return np.arange(self.shape[1], dtype=np.int32) // np.int32(self.group)
        return np.frombuffer(self._bytes(self.group_of), np.int32)

    def _whole(self, source: TensorSource) -> NDArray[np.uint32]:
        return np.frombuffer(self._bytes(source), np.uint32).reshape(source.shape)

    def _bytes(self, source: TensorSource) -> bytearray:
        return self.last_reads.read(source, 0, numel(source))
