"""Frozen weights that stay as the files of the base have them, in 4 or 8 bits, and are decoded when a layer computes.

trainer/base/stored has how files of each format are read; trainer/model/held/codes.py says which numbers codes are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, ClassVar

from trainer.model.held.formats.plain import Plain
from trainer.model.held.held import HeldFormat

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainer.model.held.codes import Kept, Numbers
    from trainer.model.held.layers import HeldWeights

# Weights that are decoded at once.
_AT_ONCE = 2**23


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
    """The codes of a weight, and a scale for each tile, in parameters slice after slice: `weight` and `scales`."""

    kept: Kept
    # Codes as indices, values, scales and products in fp32 of the weights that are decoded at once.
    decoding_bytes: ClassVar[int] = 16 * _AT_ONCE

    def sizes(self, rows: int, columns: int) -> dict[str, int]:
        return self.kept.sizes(rows, columns)

    def matrices(self, held: HeldWeights, first: int, last: int) -> Tensor:
        import torch

        kept, count, stored = self.kept, last - first, self._stored(held)
        codes, scales = self._slices(held, first, last)
        codes, scales = codes.view(count * stored[0], -1), scales.view(count, *kept.code.tiles(*stored))
        values = torch.empty(count * stored[0], stored[1], dtype=held.dtype, device=codes.device)
        at_once = max(1, _AT_ONCE // stored[1])
        for begin in range(0, len(values), at_once):
            numbers = torch.arange(begin, min(begin + at_once, len(values)), device=codes.device)
            of_rows = scales[numbers // stored[0], numbers % stored[0] // kept.code.tile[0]]
            values[begin : begin + at_once] = _decoded(kept, codes[begin : begin + at_once], of_rows, stored[1])
        return self._as_model(values.view(count, *stored))

    def by_kernel(self, held: HeldWeights, first: int, last: int) -> Tensor | None:
        from trainer.model.kernels.decode import Numbers, decode_matrices, tiling

        code, stored = self.kept.code, self._stored(held)
        tiles = tiling(stored, code.tile, code.bits)
        if tiles is None:
            return None
        numbers = Numbers(code.numbers, code.bits, _types()[self.kept.dtype])
        codes, scales = self._slices(held, first, last)
        return self._as_model(decode_matrices(codes, scales, numbers, tiles, (last - first, *stored), held.dtype))

    def _stored(self, held: HeldWeights) -> tuple[int, int]:
        """The rows and columns of a matrix in the files."""
        rows, columns = held.slice_shape
        return (columns, rows) if self.kept.transposed else (rows, columns)

    def _slices(self, held: HeldWeights, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The codes as bytes, and the scales in their type, of slices [first, last)."""
        sizes = self.kept.sizes(*held.slice_shape)
        codes, scales = (held.part(name)[first * size : last * size] for name, size in sizes.items())
        return codes, scales.view(self.scales_type)

    @property
    def scales_type(self) -> torch.dtype:
        return _types()[self.kept.scales]

    def _as_model(self, matrices: Tensor) -> Tensor:
        return matrices.mT if self.kept.transposed else matrices


def _decoded(kept: Kept, codes: Tensor, scales: Tensor, columns: int) -> Tensor:
    """Rows of codes (n, bytes) with the scales of their tiles (n, columns of tiles) -> (n, columns), in the type that
    the files' values have: the product in fp32, rounded once."""
    values = _table(kept.code.numbers, codes.device).index_select(0, codes.flatten().int()).view(len(codes), columns)
    spread = scales.float()
    if spread.shape[1] > 1:
        spread = spread.repeat_interleave(kept.code.tile[1], 1)[:, :columns]
    return (values * spread).to(_types()[kept.dtype])


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
        "as the base's files have it, in INT4, MXFP4, FP4, FP8 or INT8, and the rest in 16 bits; docs/bases.md says"
        " which bases can stay as stored"
    )
}
HELD = {"stored": Stored()}
