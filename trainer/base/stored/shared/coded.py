"""Decodes a matrix in 4 or 8 bits while it is read: each value is the number of its code times the scale of its tile.

A tile is a part of a matrix that shares one scale: 128 x 128 in FP8, a group of 16, 32 or 128 weights of a row in 4
bits, a row, or the whole matrix. A byte has two 4-bit codes, the lower half first. Integer formats have eight codes in
an int32, which are the same bytes. To read a range of weights, only its codes and the scales of its tiles are read.

Floating-point numbers of 4, 8 and 16 bits, which numpy does not know, become fp32 by tables, and go back by rounding.
E8M0 is that of the OCP Microscaling specification 1.0 (section 5.4.1); trainer/model/held/codes.py has the others.
numpy decodes here instead of torch because it is twice as fast on one thread, and several threads read at once.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.base.stored.shared.cached_values import LastReads
from trainer.base.stored.shared.moving import MatrixChange, portions
from trainer.model.held import dither
from trainer.model.held.codes import VALUES, Code, KeptSources, KeptWeight, Numbers, Seconds
from trainer.store.safetensors_index import DTYPE_BYTES, PackedSources, StoredTensor, TensorSource, as_bytes, numel

# Numbers that each reading thread decodes at once. Their fp32 values stay in a core's cache.
DECODED_AT_ONCE = 2**14


Floats = NDArray[np.float32]


def _e8m0() -> Floats:
    """The power of two that each byte represents, (256,)."""
    powers = np.ldexp(np.float32(1), np.arange(255, dtype=np.int32) - 127)
    return np.append(powers, np.float32(np.nan))


TABLES: dict[Numbers, Floats] = {numbers: np.array(values, np.float32) for numbers, values in VALUES.items()}


E2M1, E4M3, E8M0 = TABLES["e2m1"], TABLES["e4m3"], _e8m0()


# The types in which scales are stored, by safetensors' names. U8 also holds exponents, from writers whose torch had no
# type for them.
SCALES: dict[str, Callable[[bytearray | memoryview], Floats]] = {
    "F32": lambda data: np.frombuffer(data, np.float32),
    "F16": lambda data: np.frombuffer(data, np.float16).astype(np.float32),
    "BF16": lambda data: (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32),
    "F8_E8M0": lambda data: E8M0[np.frombuffer(data, np.uint8)],
    "F8_E4M3": lambda data: E4M3[np.frombuffer(data, np.uint8)],
    "U8": lambda data: E8M0[np.frombuffer(data, np.uint8)],
}


def round_to_bf16(values: Floats, out: NDArray[np.uint16]) -> None:
    """Write `values` to `out` as the bits of bf16, rounded to the nearest, ties to even. `values` are overwritten."""
    bits = values.view(np.uint32)
    bits += (bits >> 16 & 1) + np.uint32(0x7FFF)
    bits >>= 16
    out[:] = bits


def write_as(values: Floats, dtype: str, data: bytearray | NDArray[np.uint8], at: int = 0) -> None:
    """Write `values` to `data`, after its first `at` values, in a type of 16 or 32 bits. `values` are overwritten.

    `dtype` is safetensors' name of the type.
    """
    places = slice(at, at + len(values))
    if dtype == "BF16":
        round_to_bf16(values, np.frombuffer(data, np.uint16)[places])
    else:
        np.frombuffer(data, np.float16 if dtype == "F16" else np.float32)[places] = values


# The values of the two codes in a byte, (256, 2).
_PAIRS = {
    name: np.stack([table[np.arange(256) & 15], table[np.arange(256) >> 4]], axis=1)
    for name, table in TABLES.items()
    if len(table) == 16
}


@dataclass(frozen=True)
class Coded:
    """The values of a matrix or a stack (..., rows, columns) in `code`. `scales` has one for each tile, in their order.

    `second` is one scale of the scales for a whole matrix. It multiplies them, or divides them if `second_divides`.
    `zeros` has the code that means zero in each tile, unless that is the number 0. They are packed along the rows of
    tiles into int32, (ceil(tile rows / codes an int32), tile columns), or lie one by one in I8. `order` is the column
    of tiles of each column, if the columns of a tile do not lie together. `then` multiplies the products once more.
    """

    codes: TensorSource
    scales: TensorSource
    shape: tuple[int, ...]
    code: Code
    last_reads: LastReads
    dtype: str = "BF16"
    second: TensorSource | None = None
    second_divides: bool = False
    zeros: TensorSource | None = None
    order: TensorSource | None = None
    then: float | None = None

    by_columns: ClassVar[bool] = False

    def read(self, begin: int, end: int) -> bytearray:
        each, item = 8 // self.code.bits, DTYPE_BYTES[self.dtype]
        start = begin // each
        raw = as_bytes(self.codes).read(start, -(-end // each))
        data = bytearray(max(item * (end - begin), len(raw)))
        # Decode in place, from the front. Codes lie at the end and are read before values overwrite them.
        data[len(data) - len(raw) :] = raw
        stored = np.frombuffer(data, np.uint8)[len(data) - len(raw) :]
        del raw
        columns = self.shape[-1]
        first_tiles = self._row_of_tiles(begin // columns)
        tiles = self._scales(first_tiles, self._row_of_tiles((end - 1) // columns) + 1)
        zeros = None if self.zeros is None else self._zeros(self.zeros, first_tiles, first_tiles + len(tiles))
        tile_of = self._tile_of_columns()
        decoded = np.frombuffer(data, np.uint8)[: item * (end - begin)]
        for first, last in self._runs(begin, end):
            width = min(columns, last - first)
            of_rows = slice(
                self._row_of_tiles(first // columns) - first_tiles,
                self._row_of_tiles((last - 1) // columns) - first_tiles + 1,
            )
            across = tile_of[first % columns :][:width]
            values = self._values(stored, first - start * each, last - start * each).reshape(-1, width)
            if zeros is not None:
                values -= zeros[of_rows].take(across, axis=1, mode="clip")
            with np.errstate(over="ignore", invalid="ignore"):  # transformers also gets infinity there
                values *= tiles[of_rows].take(across, axis=1, mode="clip")
                if self.then is not None:
                    values *= np.float32(self.then)
                write_as(values.reshape(-1), self.dtype, decoded[item * (first - begin) : item * (last - begin)])
        del data[item * (end - begin) :]
        return data

    @property
    def kept(self) -> KeptSources | None:
        """The sources with which it can stay as it is. None if the columns of a tile do not lie together, or products
        are scaled once more."""
        if self.order is not None or self.then is not None:
            return None
        parts: dict[str, StoredTensor] = {"weight": as_bytes(self.codes), "scales": as_bytes(self.scales)}
        seconds: Seconds = "none"
        if self.second is not None:
            seconds = "over" if self.second_divides else "times"
            parts["seconds"] = _EachRow(self.second, math.prod(self.shape[:-1]), self.last_reads)
        if self.zeros is not None:
            parts["zeros"] = _Zeros(self)
        kept = KeptWeight(self.code, self.scales.dtype, self.dtype, seconds=seconds, zeros=self.zeros is not None)
        return KeptSources(kept, PackedSources(parts, None))

    @property
    def unit(self) -> int:
        return self.shape[-1] * self.code.bits // 8

    def move(self, units: Tensor, first: int, change: MatrixChange) -> int:
        """As `Movable`: a unit is a row."""
        columns, differing = torch.arange(self.shape[-1]), 0
        for begin, end in portions(len(units), len(columns), at_once=change.at_once):
            codes = dither.unpacked(units[begin:end], self.code.bits)
            rows = torch.arange(first + begin, first + end)
            tiles, scales = self._tiles_of(rows)
            steps = change.of_rows(first + begin, end - begin, lambda at=(codes, tiles, scales): self._decoded(*at))
            by = torch.from_numpy(scales)
            found = change.moved(self.code.numbers, codes, steps / by, by, rows, columns)
            differing += int(found.ne(codes).sum())
            units[begin:end] = dither.packed(found, self.code.bits)
        return differing

    def _tiles_of(self, rows: Tensor) -> tuple[NDArray[np.int64], Floats]:
        """The row of tiles of each of these consecutive rows, and the scale of each of their weights."""
        tiles = np.array([self._row_of_tiles(int(row)) for row in rows], np.int64)
        scales = self._scales(int(tiles[0]), int(tiles[-1]) + 1)[tiles - tiles[0]]
        scales = scales.take(self._tile_of_columns(), axis=1)
        return tiles, scales if self.then is None else scales * np.float32(self.then)

    def _decoded(self, codes: Tensor, tiles: NDArray[np.int64], scales: Floats) -> Tensor:
        """The weights of whole rows in fp32, which are not rounded to a type."""
        values = TABLES[self.code.numbers].take(codes.numpy())
        if self.zeros is not None:
            zeros = self._zeros(self.zeros, int(tiles[0]), int(tiles[-1]) + 1)[tiles - tiles[0]]
            values = values - zeros.take(self._tile_of_columns(), axis=1)
        return torch.from_numpy(values * scales)

    def _row_of_tiles(self, number: int) -> int:
        """The row of tiles in which the row `number` of the stack lies."""
        rows, down = self.shape[-2], self.code.tile[0]
        matrix, row = divmod(number, rows)
        return matrix * math.ceil(rows / down) + row // down

    def _scales(self, first: int, last: int) -> Floats:
        """Return the scales of the rows of tiles [first, last), (last - first, columns of tiles)."""
        source, per_row = self.scales, self.code.tiles(*self.shape[-2:])[1]
        begin, end = first * per_row, last * per_row
        if self.code.tile[0] > 1 or per_row == 1:  # there are so few that reading all of them once is cheap
            whole = SCALES[source.dtype](self.last_reads.read(source, 0, numel(source)))
            found = whole[begin:end]
        else:
            found = SCALES[source.dtype](source.read(begin, end))
        if self.second is not None:
            by = SCALES[self.second.dtype](self.last_reads.read(self.second, 0, 1))
            found = found / by if self.second_divides else found * by
        return found.reshape(-1, per_row)

    def _zeros(self, packed: TensorSource, first: int, last: int) -> Floats:
        """Return the numbers that mean zero in the rows of tiles [first, last), (last - first, columns of tiles)."""
        return TABLES[self.code.numbers][self.zero_codes(packed, first, last)]

    def zero_codes(self, packed: TensorSource, first: int, last: int) -> NDArray[Any]:
        """Return the codes that mean zero in the rows of tiles [first, last), (last - first, columns of tiles)."""
        each, columns = 32 // self.code.bits, packed.shape[1]
        if packed.dtype == "I8":
            return np.frombuffer(packed.read(first * columns, last * columns), np.uint8).reshape(-1, columns)
        begin, end = first // each, -(-last // each)
        words = np.frombuffer(packed.read(begin * columns, end * columns), np.uint32).reshape(-1, 1, columns)
        shifts = np.arange(0, 32, self.code.bits, dtype=np.uint32)[:, None]
        codes = (words >> shifts & np.uint32(2**self.code.bits - 1)).reshape(-1, columns)
        return codes[first - begin * each : last - begin * each]

    def _tile_of_columns(self) -> NDArray[np.int32]:
        """The column of tiles in which each column lies."""
        if self.order is None:
            return np.arange(self.shape[-1], dtype=np.int32) // np.int32(self.code.tile[1])
        return np.frombuffer(self.last_reads.read(self.order, 0, numel(self.order)), np.int32)

    def _values(self, stored: NDArray[np.uint8], begin: int, end: int) -> Floats:
        """The numbers that the codes [begin, end) represent."""
        if self.code.bits == 8:
            return TABLES[self.code.numbers].take(stored[begin:end], mode="clip")
        pairs = _PAIRS[self.code.numbers].take(stored[begin // 2 : -(-end // 2)], axis=0, mode="clip")
        return pairs.reshape(-1)[begin % 2 : begin % 2 + end - begin]

    def _runs(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Divide [begin, end) into runs of whole rows of one row of tiles, and the parts of rows at both ends."""
        (rows, columns), down = self.shape[-2:], self.code.tile[0]
        while begin < end:
            number, column = divmod(begin, columns)
            row = number % rows
            if column or end - begin < columns:
                last = min(end, begin - column + columns)
            else:
                tile_end = rows if down == 1 else min(rows, (row // down + 1) * down)
                at_once = max(1, DECODED_AT_ONCE // columns)
                last = begin + min((end - begin) // columns, tile_end - row, at_once) * columns
            yield begin, last
            begin = last


@dataclass(frozen=True)
class _EachRow:
    """The bytes of one fp32 number, once for each of so many rows."""

    number: TensorSource
    rows: int
    last_reads: LastReads
    dtype: str = "U8"

    @property
    def shape(self) -> tuple[int, ...]:
        return (4 * self.rows,)

    def read(self, begin: int, end: int) -> bytearray:
        (number,) = SCALES[self.number.dtype](self.last_reads.read(self.number, 0, 1))
        return bytearray(np.full(-(-end // 4) - begin // 4, number, np.float32).tobytes()[begin % 4 :][: end - begin])


@dataclass(frozen=True)
class _Zeros:
    """The codes that mean zero, a byte for each tile."""

    weight: Coded
    dtype: str = "U8"

    @property
    def shape(self) -> tuple[int, ...]:
        return (math.prod(self.weight.code.tiles(*self.weight.shape[-2:])),)

    def read(self, begin: int, end: int) -> bytearray:
        assert self.weight.zeros is not None
        across = self.weight.code.tiles(*self.weight.shape[-2:])[1]
        codes = self.weight.zero_codes(self.weight.zeros, begin // across, -(-end // across))
        return bytearray(codes.astype(np.uint8).tobytes()[begin % across :][: end - begin])


BLOCK = 32
_LOWER, _UPPER = E2M1[np.arange(256) & 15], E2M1[np.arange(256) >> 4]


@dataclass(frozen=True)
class Mxfp4Experts:
    """The bf16 values of a stack (experts, inputs, outputs) whose transpose is stored in `blocks` and `scales`."""

    blocks: TensorSource
    scales: TensorSource
    last_reads: LastReads
    dtype: str = "BF16"

    by_columns: ClassVar[bool] = True

    @property
    def shape(self) -> tuple[int, ...]:
        experts, outputs, groups, _ = self.blocks.shape
        return experts, groups * BLOCK, outputs

    @property
    def kept(self) -> KeptSources:
        """The sources of its codes and scales, with which it can stay as it is."""
        parts: dict[str, StoredTensor] = {"weight": as_bytes(self.blocks), "scales": as_bytes(self.scales)}
        kept = KeptWeight(Code("e2m1", (1, BLOCK)), "F8_E8M0", self.dtype, transposed=True)
        return KeptSources(kept, PackedSources(parts, None))

    def read(self, begin: int, end: int) -> bytearray:
        data = bytearray(2 * (end - begin))
        decoded = np.frombuffer(data, np.uint16)
        _, inputs, outputs = self.shape
        size, strip = inputs * outputs, BLOCK * outputs
        for expert in range(begin // size, math.ceil(end / size)):
            blocks, scales = self._expert(expert)
            first, last = max(begin, expert * size), min(end, (expert + 1) * size)
            for start in range(first // strip * strip, last, strip):
                group = start % size // strip
                at = start
                for values in _decoded(blocks[:, group], scales[:, group]):
                    low, high = max(first, at), min(last, at + len(values))
                    if low < high:
                        decoded[low - begin : high - begin] = values[low - at : high - at]
                    at += len(values)
        return data

    @property
    def codes(self) -> TensorSource:
        return self.blocks

    @property
    def unit(self) -> int:
        return self.shape[1] // 2

    def move(self, units: Tensor, first: int, change: MatrixChange) -> int:
        """As `Movable`: a unit has the weights of one output of one expert."""
        _, inputs, outputs = self.shape
        differing = 0
        for begin, end in portions(len(units), inputs, lambda unit: outputs - (first + unit) % outputs):
            expert, output = divmod(first + begin, outputs)
            codes = dither.unpacked(units[begin:end], 4)
            across = inputs // BLOCK
            raw = self.scales.read((first + begin) * across, (first + end) * across)
            scales = torch.from_numpy(E8M0[np.frombuffer(raw, np.uint8)]).view(-1, across).repeat_interleave(BLOCK, 1)
            of = torch.arange(output, output + end - begin)
            at = change.thresholds(expert * inputs + torch.arange(inputs), of)
            steps = change.of_columns(expert, output, output + end - begin) / scales
            found = dither.moved("e2m1", codes, steps, None if at is None else at.T)
            differing += int(found.ne(codes).sum())
            units[begin:end] = dither.packed(found, 4)
        return differing

    def _expert(self, expert: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The blocks (outputs, inputs / 32, 16) and the scales (outputs, inputs / 32) of an expert."""
        _, outputs, groups, half = self.blocks.shape
        count = outputs * groups
        blocks = self.last_reads.read(self.blocks, expert * count * half, (expert + 1) * count * half)
        scales = self.last_reads.read(self.scales, expert * count, (expert + 1) * count)
        return (
            np.frombuffer(blocks, np.uint8).reshape(outputs, groups, half),
            np.frombuffer(scales, np.uint8).reshape(outputs, groups),
        )


def _decoded(blocks: NDArray[np.uint8], scales: NDArray[np.uint8]) -> Iterator[NDArray[np.uint32]]:
    """Yield the bf16 bits of one block of each output: blocks (outputs, 16), scales (outputs,) -> (32 * outputs,).

    The values come input by input, each with all of its outputs, and some inputs at a time."""
    pairs, powers = np.ascontiguousarray(blocks.T), E8M0[scales]
    at_once = max(1, DECODED_AT_ONCE // 2 // len(scales))
    for first in range(0, len(pairs), at_once):
        part = pairs[first : first + at_once]
        values = np.stack([_LOWER.take(part, mode="clip"), _UPPER.take(part, mode="clip")], axis=1)
        with np.errstate(over="ignore"):  # transformers also gets infinity there
            values *= powers
        # The upper half of the fp32 number is exact: the mantissa has two bits, and bf16 has all of the exponents.
        bits = values.reshape(-1).view(np.uint32)
        bits >>= 16
        yield bits
