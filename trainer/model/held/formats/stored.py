"""Frozen weights that stay as the files of the base have them, in 4 or 8 bits, and are decoded when a layer computes.

trainer/base/stored has how files of each format are read; trainer/model/held/codes.py says which numbers codes are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from trainer.model.held import HeldFormat, Moves
from trainer.model.held.formats.plain import Plain

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainer.model.held.codes import KeptWeight, Numbers
    from trainer.model.held.layers import HeldWeights

# Weights that are decoded at once by a GPU, or moved by its kernel: their change takes 12 bytes each. Moving codes
# operator by operator takes several times as much, so fewer are moved at once. A CPU works on as many as its cache
# holds: larger tensors take it four times as long.
_AT_ONCE, _MOVED_AT_ONCE, _ON_CPU = 2**23, 2**20, 2**17


class _Stored(HeldFormat):
    quantizes: ClassVar[bool] = False
    in_words: ClassVar[str] = "as it is stored"  # type: ignore[misc]


class Stored(_Stored):
    """Each weight as its own file has it; what files have in 16 bits stays in them."""

    def of(self, kept: KeptWeight | None) -> HeldFormat:
        return Plain() if kept is None else KeptCodes(kept)

    def sizes(self, rows: int, columns: int) -> dict[str, int]:
        raise AssertionError("the files say how each weight is held")

    def matrices(self, held: HeldWeights, first: int, last: int) -> Tensor:
        raise AssertionError("the files say how each weight is held")


@dataclass(frozen=True)
class KeptCodes(_Stored):
    """The codes of a weight and what its tiles and rows share, slice after slice, in `KeptWeight.sizes` parameters."""

    kept: KeptWeight
    # Codes as indices, values, scales and products in fp32 of the weights that are decoded at once. The change of as
    # many weights, which a kernel moves, takes less: 8 bytes as it is summed, and 4 that are rounded.
    decoding_bytes: ClassVar[int] = 16 * _AT_ONCE
    # The change in fp64 is written and read, and in fp32 again.
    moving_traffic: ClassVar[float] = 24.0

    def sizes(self, rows: int, columns: int) -> dict[str, int]:
        return self.kept.sizes(rows, columns)

    @property
    def moves(self) -> bool:
        return True

    def matrices(self, held: HeldWeights, first: int, last: int) -> Tensor:
        return self._matrices(held, first, last, None)

    def moved(self, held: HeldWeights, first: int, last: int, by: Moves) -> Tensor:
        return self._matrices(held, first, last, by)

    def _matrices(self, held: HeldWeights, first: int, last: int, by: Moves | None) -> Tensor:
        import torch

        from trainer.processes.accelerator import is_accelerator

        kept, count, stored = self.kept, last - first, self._stored(held)
        codes, tiles = self._slices(held, first, last)
        codes = codes.view(count * stored[0], -1)
        values = torch.empty(count * stored[0], stored[1], dtype=held.dtype, device=codes.device)
        largest = _AT_ONCE if by is None else _MOVED_AT_ONCE
        at_once = max(1, (largest if is_accelerator(codes.device) else _ON_CPU) // stored[1])
        moving = None if by is None else _Moving.of(kept, by, stored, (first, last), codes.device)
        all_rows = torch.arange(len(values), device=codes.device)
        for begin in range(0, len(values), at_once):
            end = min(begin + at_once, len(values))
            of_rows = _of_rows(kept, tiles, all_rows[begin:end], stored)
            part = codes[begin:end]
            if moving is not None:
                part = _moved(kept, part, of_rows.scales, *moving.rows(begin, end))
            values[begin:end] = _decoded(kept, part, of_rows, stored[1], self._rounded(held))
        return self._as_model(values.view(count, *stored))

    def by_kernel(self, held: HeldWeights, first: int, last: int, by: Moves | None) -> Tensor | None:
        from trainer.model.kernels.decode import Beside, Numbers, decode_matrices, tiling

        if by is not None:
            return self._moved_by_kernel(held, first, last, by)
        code, stored = self.kept.code, self._stored(held)
        tiles = tiling(stored, code.tile, code.bits)
        if tiles is None:
            return None
        numbers = Numbers(code.numbers, code.bits, self._rounded(held))
        codes, shared = self._slices(held, first, last)
        beside = Beside(self.kept.seconds, shared.seconds, shared.zeros)
        shape = (last - first, *stored)
        return self._as_model(decode_matrices(codes, shared.scales, numbers, tiles, shape, held.dtype, beside=beside))

    def _moved_by_kernel(self, held: HeldWeights, first: int, last: int, by: Moves) -> Tensor | None:
        import torch

        from trainer.model.kernels.decode import Beside, Numbers
        from trainer.model.kernels.move import Moving, decode_moved, tiling

        kept, (rows, columns), count = self.kept, self._stored(held), last - first
        tiles = tiling((rows, columns), kept.code.tile, kept.code.bits)
        if tiles is None:
            return None
        numbers = Numbers(kept.code.numbers, kept.code.bits, self._rounded(held))
        codes, shared = self._slices(held, first, last)
        codes = codes.view(count * rows, -1)
        moving = _Moving.of(kept, by, (rows, columns), (first, last), codes.device)
        values = torch.empty(count * rows, columns, dtype=held.dtype, device=codes.device)
        for begin, end in _portions(count, (rows, columns), kept.code.tile[0]):
            of_portion = _of_portion(kept, shared, begin, end, (rows, columns))
            decode_moved(
                codes[begin:end].view(-1),
                of_portion.scales,
                numbers,
                tiles,
                Moving(moving.change(begin, end), *moving.numbers(begin, end)),
                values[begin:end].view(-1, min(rows, end - begin), columns),
                Beside(kept.seconds, of_portion.seconds, of_portion.zeros),
            )
        return self._as_model(values.view(count, rows, columns))

    def _rounded(self, held: HeldWeights) -> torch.dtype:
        """The type that products of codes and scales are rounded to: the one that the files' values have.

        A run in fp32 does not round them, as transformers does not with the compressed-tensors package.
        """
        import torch

        return torch.float32 if held.unrounded else _types()[self.kept.dtype]

    def _stored(self, held: HeldWeights) -> tuple[int, int]:
        """The rows and columns of a matrix in the files."""
        rows, columns = held.slice_shape
        return (columns, rows) if self.kept.transposed else (rows, columns)

    def _slices(self, held: HeldWeights, first: int, last: int) -> tuple[Tensor, _Shared]:
        """The codes of slices [first, last) as bytes, and what their tiles and rows share, each flat in its type."""
        import torch

        sizes = self.kept.sizes(*held.slice_shape)
        parts = {name: held.part(name)[first * size : last * size] for name, size in sizes.items()}
        seconds = parts.get("seconds")
        shared = _Shared(
            parts["scales"].view(self.scales_type),
            None if seconds is None else seconds.view(torch.float32),
            parts.get("zeros"),
        )
        return parts["weight"], shared

    @property
    def scales_type(self) -> torch.dtype:
        return _types()[self.kept.scales]

    def _as_model(self, matrices: Tensor) -> Tensor:
        return matrices.mT if self.kept.transposed else matrices


class _Shared(NamedTuple):
    """Scales of tiles; the number by which those of a row are multiplied or divided; the codes that mean zero in
    tiles."""

    scales: Tensor
    seconds: Tensor | None
    zeros: Tensor | None


def _of_rows(kept: KeptWeight, shared: _Shared, numbers: Tensor, stored: tuple[int, int]) -> _Shared:
    """The values that the tiles of these rows share, each (n, columns of tiles), with the seconds in the scales.
    `numbers` are those of the rows among the matrices."""
    down, across = kept.code.tiles(*stored)
    tiles = numbers // stored[0] * down + numbers % stored[0] // kept.code.tile[0]
    scales = shared.scales.view(-1, across)[tiles]
    if shared.seconds is not None:
        seconds = shared.seconds[numbers, None]
        scales = scales.float() * seconds if kept.seconds == "times" else scales.float() / seconds
    return _Shared(scales, None, None if shared.zeros is None else shared.zeros.view(-1, across)[tiles])


class _Moving(NamedTuple):
    """How the rows of stored matrices, whose shape is `stored`, move. `first` is the number of the first matrix in the
    stack. `down` and `across` are the dither's numbers of all rows and columns, as they lie in the files."""

    by: Moves
    stored: tuple[int, int]
    transposed: bool
    first: int
    down: Tensor
    across: Tensor

    @classmethod
    def of(
        cls, kept: KeptWeight, by: Moves, stored: tuple[int, int], matrices: tuple[int, int], device: torch.device
    ) -> _Moving:
        import torch

        from trainer.model.held import dither

        # In the files the rows of a stack are counted over all its matrices, and so are those of the model's matrices.
        first, last = matrices
        rows, columns = (stored[1], stored[0]) if kept.transposed else stored
        of_rows = dither.numbers_of_rows(by.name, torch.arange(first * rows, last * rows, device=device))
        of_columns = dither.numbers_of_columns(by.name, torch.arange(columns, device=device))
        down, across = (of_columns, of_rows) if kept.transposed else (of_rows, of_columns)
        return cls(by, stored, kept.transposed, first, down, across)

    def rows(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """The change of rows [begin, end), counted from those of the first matrix on, and their thresholds."""
        import torch

        from trainer.model.held import dither

        change = self.change(begin, end)
        if not self.transposed:
            return change, dither.between(*self.numbers(begin, end))
        parts = (dither.between(*self.numbers(*part)) for part in self._by_matrices(begin, end))
        return change, torch.cat(list(parts))

    def change(self, begin: int, end: int) -> Tensor:
        """The change of these rows, fp32 (end - begin, columns), contiguous."""
        import torch

        down, across = self.stored
        if not self.transposed:
            return self.by.change(self.first * down + begin, end - begin)
        # A row has a column of the model's matrix.
        changes: list[Tensor] = []
        for start, stop in self._by_matrices(begin, end):
            matrix = start // down
            columns = slice(start - matrix * down, stop - matrix * down)
            changes.append(self.by.change((self.first + matrix) * across, across, columns).T)
        return torch.cat(changes).contiguous()

    def numbers(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """The dither's numbers of these rows, which are of one matrix or of whole ones, and of their columns. If they
        are the same in all of these matrices, those of one."""
        if not self.transposed:
            return self.down[begin:end], self.across
        down, across = self.stored
        first, last = begin // down, (end - 1) // down + 1
        of_matrix = slice(begin - first * down, min(end - first * down, down))
        return self.down[of_matrix], self.across[first * across : last * across]

    def _by_matrices(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Rows [begin, end), those of each matrix by themselves."""
        down = self.stored[0]
        while begin < end:
            stop = min(end, (begin // down + 1) * down)
            yield begin, stop
            begin = stop


def _portions(count: int, stored: tuple[int, int], tile_rows: int) -> Iterator[tuple[int, int]]:
    """Rows of matrices, of which a kernel moves the codes at once: whole matrices, or whole tiles of one."""
    rows, columns = stored
    at_once = max(1, _AT_ONCE // columns)
    whole = at_once // rows * rows
    if whole:
        for begin in range(0, count * rows, whole):
            yield begin, min(begin + whole, count * rows)
        return
    step = at_once if tile_rows >= rows else max(tile_rows, at_once // tile_rows * tile_rows)
    for matrix in range(0, count * rows, rows):
        for begin in range(matrix, matrix + rows, step):
            yield begin, min(begin + step, matrix + rows)


def _of_portion(kept: KeptWeight, shared: _Shared, begin: int, end: int, stored: tuple[int, int]) -> _Shared:
    """Return what the rows of a portion share, flat."""
    down, across = kept.code.tiles(*stored)
    matrix, row = divmod(begin, stored[0])
    first = matrix * down + row // kept.code.tile[0]
    matrix, row = divmod(end - 1, stored[0])
    tiles = slice(first * across, (matrix * down + row // kept.code.tile[0] + 1) * across)
    seconds, zeros = shared.seconds, shared.zeros
    return _Shared(
        shared.scales[tiles], None if seconds is None else seconds[begin:end], None if zeros is None else zeros[tiles]
    )


def _moved(kept: KeptWeight, codes: Tensor, scales: Tensor, change: Tensor, at: Tensor) -> Tensor:
    """The same rows of codes (n, bytes), moved by their `change` at these thresholds, both (n, columns)."""
    import torch

    from trainer.model.held import dither

    bits = kept.code.bits
    steps = _by_tiles(torch.Tensor.div_, kept, change, scales)
    return dither.packed(dither.moved(kept.code.numbers, dither.unpacked(codes, bits), steps, at), bits)


def _by_tiles(operation: Callable[[Tensor, Tensor], Tensor], kept: KeptWeight, values: Tensor, tiles: Tensor) -> Tensor:
    """Multiply values (n, columns), in place, by the number of their tile (n, columns of tiles), or another operation,
    in fp32."""
    (rows, columns), across, tiles = values.shape, kept.code.tile[1], tiles.float()
    if tiles.shape[1] == 1:
        return operation(values, tiles)
    if columns % across:
        return operation(values, tiles.repeat_interleave(across, 1)[:, :columns])
    return operation(values.view(rows, -1, across), tiles[..., None]).view(rows, columns)


def _decoded(kept: KeptWeight, codes: Tensor, of_rows: _Shared, columns: int, rounded: torch.dtype) -> Tensor:
    """Rows of codes (n, bytes) and what their tiles share -> (n, columns): in fp32 the number of a code, less that of
    zero, by the scale, `rounded` once."""
    import torch

    pairs = kept.code.bits == 4
    table = _table(kept.code.numbers, codes.device)
    # A byte's two values are looked up as one of 8 bytes, which is four times as fast on a CPU.
    values = (table.view(torch.float64) if pairs else table).flatten().index_select(0, codes.flatten().int())
    values = values.view(torch.float32).view(len(codes), columns)
    if of_rows.zeros is not None:  # a code by itself, even where two share a byte
        zeros = table[:, 0][of_rows.zeros.int()]
        values = _by_tiles(torch.Tensor.sub_, kept, values, zeros)
    return _by_tiles(torch.Tensor.mul_, kept, values, of_rows.scales).to(rounded)


@cache
def _table(numbers: Numbers, device: torch.device) -> Tensor:
    """The values of the codes in each byte, fp32: (256, 2) of codes in 4 bits, (256, 1) of others."""
    import torch

    from trainer.model.held.codes import VALUES

    values, byte = torch.tensor(VALUES[numbers], dtype=torch.float32), torch.arange(256)
    table = torch.stack([values[byte & 15], values[byte >> 4]], 1) if len(values) == 16 else values[:, None]
    return table.to(device)


@cache
def _types() -> dict[str, torch.dtype]:
    import torch

    return {
        "BF16": torch.bfloat16,
        "F16": torch.float16,
        "F32": torch.float32,
        "F8_E8M0": torch.float8_e8m0fnu,
        "U8": torch.float8_e8m0fnu,
        "F8_E4M3": torch.float8_e4m3fn,
    }


ABOUT = {
    "stored": (
        "as the base's files have it, in INT4, MXFP4, NVFP4, FP8 or INT8, and the rest in 16 bits; docs/bases.md says"
        " which bases can stay as stored"
    )
}
HELD = {"stored": Stored()}
