"""The values of a matrix in FP8, as they are read: each number of float8_e4m3 times the scale of its tile, as bf16."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trainer.base.stored.shared.floats import DECODED_AT_ONCE, E4M3, SCALES, round_to_bf16
from trainer.base.stored.shared.reads import LastReads
from trainer.files.safetensors_index import TensorSource, numel


@dataclass(frozen=True)
class Fp8Tiles:
    """The bf16 values of `weight` (..., rows, columns), whose tiles of `tile` have `scales` (..., ceil(rows / tile[0]),
    ceil(columns / tile[1])): a range of them costs as many bytes of the weight, and its scales."""

    weight: TensorSource
    scales: TensorSource
    tile: tuple[int, int]
    last_reads: LastReads
    dtype: str = "BF16"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def read(self, begin: int, end: int) -> bytearray:
        raw, data = self.weight.read(begin, end), bytearray(2 * (end - begin))
        # It is decoded in place, from the front: a byte of the second half is read before two others are written over it.
        data[end - begin :] = raw
        del raw
        stored, decoded = np.frombuffer(data, np.uint8)[end - begin :], np.frombuffer(data, np.uint16)
        whole = self.last_reads.read(self.scales, 0, numel(self.scales))
        (rows, columns), (down, across) = self.shape[-2:], self.tile
        scales = SCALES[self.scales.dtype](whole).reshape(-1, math.ceil(columns / across))
        for first, last in self._runs(begin, end):
            (matrix, row), column = divmod(first // columns, rows), first % columns
            width = min(columns, last - first)
            tiles = scales[matrix * math.ceil(rows / down) + row // down]
            values = E4M3.take(stored[first - begin : last - begin], mode="clip").reshape(-1, width)
            with np.errstate(over="ignore"):  # infinity is what transformers has there too
                values *= tiles.repeat(across)[column : column + width]
            round_to_bf16(values.reshape(-1), decoded[first - begin : last - begin])
        return data

    def _runs(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """[begin, end) in runs of whole rows of one row of tiles, and of the parts of rows at both ends."""
        rows, columns = self.shape[-2:]
        while begin < end:
            number, column = divmod(begin, columns)
            row = number % rows
            if column or end - begin < columns:
                last = min(end, begin - column + columns)
            else:
                tile_end = min(rows, (row // self.tile[0] + 1) * self.tile[0])
                at_once = max(1, DECODED_AT_ONCE // columns)
                last = begin + min((end - begin) // columns, tile_end - row, at_once) * columns
            yield begin, last
            begin = last
