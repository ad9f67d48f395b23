"""Frozen weights that stay as the files of the base have them, in 4 or 8 bits, and are decoded when a layer computes.

trainer/base/stored has how files of each format are read; trainer/model/held/codes.py says which numbers codes are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from trainer.model.held.formats.plain import Plain
from trainer.model.held.held import HeldFormat, Moves

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainer.model.held.codes import Kept, Numbers
    from trainer.model.held.layers import HeldWeights

# Weights that are decoded at once by a GPU. Moving their codes first takes several times the memory, so fewer are moved
# at once. A CPU works on as many as its cache holds: larger tensors take it four times as long.
_AT_ONCE, _MOVED_AT_ONCE, _ON_CPU = 2**23, 2**20, 2**17


class _Stored(HeldFormat):
    quantizes: ClassVar[bool] = False
    in_words: ClassVar[str] = "as it is stored"  # type: ignore[misc]


class Stored(_Stored):
    """Each weight as its own file has it; what files have in 16 bits stays in them."""

    def of(self, kept: Kept | None) -> HeldFormat:
        return Plain() if kept is None else KeptCodes(kept)

    def sizes(self, rows: int, columns: int) -> dict[str, int]:
        raise AssertionError("the files say how each weight is held")

    def matrices(self, held: HeldWeights, first: int, last: int) -> Tensor:
        raise AssertionError("the files say how each weight is held")


@dataclass(frozen=True)
class KeptCodes(_Stored):
    """The codes of a weight and what its tiles and rows share, slice after slice in the parameters of `Kept.sizes`."""

    kept: Kept
    # Codes as indices, values, scales and products in fp32 of the weights that are decoded at once.
    decoding_bytes: ClassVar[int] = 16 * _AT_ONCE
    # Operator by operator, each of which reads and writes four bytes a weight or eight.
    moving_traffic: ClassVar[float] = 150.0

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

    def by_kernel(self, held: HeldWeights, first: int, last: int) -> Tensor | None:
        from trainer.model.kernels.decode import Beside, Numbers, decode_matrices, tiling

        code, stored = self.kept.code, self._stored(held)
        tiles = tiling(stored, code.tile, code.bits)
        if tiles is None:
            return None
        numbers = Numbers(code.numbers, code.bits, self._rounded(held))
        codes, shared = self._slices(held, first, last)
        beside = Beside(self.kept.seconds, shared.seconds, shared.zeros)
        shape = (last - first, *stored)
        return self._as_model(decode_matrices(codes, shared.scales, numbers, tiles, shape, held.dtype, beside=beside))

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


def _of_rows(kept: Kept, shared: _Shared, numbers: Tensor, stored: tuple[int, int]) -> _Shared:
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
        cls, kept: Kept, by: Moves, stored: tuple[int, int], matrices: tuple[int, int], device: torch.device
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

        down, across = self.stored
        if not self.transposed:
            change = self.by.change(self.first * down + begin, end - begin)
            return change, dither.between(self.down[begin:end], self.across)
        # A row has a column of the model's matrix. The run may end in another matrix than it begins in.
        changes: list[Tensor] = []
        at: list[Tensor] = []
        for matrix in range(begin // down, (end - 1) // down + 1):
            columns = slice(max(begin - matrix * down, 0), min(end - matrix * down, down))
            rows = slice(matrix * across, (matrix + 1) * across)
            changes.append(self.by.change((self.first + matrix) * across, across, columns).T)
            at.append(dither.between(self.down[columns], self.across[rows]))
        return torch.cat(changes).contiguous(), torch.cat(at)


def _moved(kept: Kept, codes: Tensor, scales: Tensor, change: Tensor, at: Tensor) -> Tensor:
    """The same rows of codes (n, bytes), moved by their `change` at these thresholds, both (n, columns)."""
    import torch

    from trainer.model.held import dither

    bits = kept.code.bits
    steps = _by_tiles(torch.Tensor.div_, kept, change, scales)
    return dither.packed(dither.moved(kept.code.numbers, dither.unpacked(codes, bits), steps, at), bits)


def _by_tiles(operation: Callable[[Tensor, Tensor], Tensor], kept: Kept, values: Tensor, tiles: Tensor) -> Tensor:
    """Multiply values (n, columns), in place, by the number of their tile (n, columns of tiles), or another operation,
    in fp32."""
    (rows, columns), across, tiles = values.shape, kept.code.tile[1], tiles.float()
    if tiles.shape[1] == 1:
        return operation(values, tiles)
    if columns % across:
        return operation(values, tiles.repeat_interleave(across, 1)[:, :columns])
    return operation(values.view(rows, -1, across), tiles[..., None]).view(rows, columns)


def _decoded(kept: Kept, codes: Tensor, of_rows: _Shared, columns: int, rounded: torch.dtype) -> Tensor:
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
