"""Bases in FP8, as DeepSeek, Qwen, MiniMax and Mistral publish them: float8_e4m3, and a scale for each tile of a matrix.

Beside `q_proj.weight` (rows, columns) the files have `q_proj.weight_scale_inv`, by which a weight is multiplied: one number for each
tile of `weight_block_size` (config.json, quantization_config), usually 128 x 128, those at the borders cut off; or, where that
is null, one for the whole matrix. Tensors without a scale are in 16 or 32 bits.

Weights become bf16 as they are read: the product in fp32, rounded once. transformers' dequantize=True and DeepSeek's own
inference/fp8_cast_bf16.py give the same bits, the former where the tile divides both sides: it takes the shape of the scales
for a number of equal tiles, which is another tile for 192 rows (two of 96), and an error for 576.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from trainer.base.base import Base
from trainer.base.floats import DECODED_AT_ONCE, E4M3, SCALES, round_to_bf16
from trainer.base.last_reads import LastReads
from trainer.config import Config
from trainer.errors import ConfigError, shown
from trainer.safetensors_index import StoredTensor, TensorSource, numel

# Scales of so many matrices are kept, a few thousand numbers each: pieces of more are never in flight.
_SCALES_KEPT = 32
_USUAL_TILE = [128, 128]


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


@dataclass(frozen=True)
class Fp8:
    """Matrices in FP8, all else as in a plain base; `quantization` is what config.json says of it."""

    quantization: dict[str, Any]

    unmergeable: ClassVar[str | None] = "stored in FP8, where no new weight fits"
    quantized: ClassVar[bool] = False
    decoded: ClassVar[bool] = True

    @staticmethod
    def stores(quantization: dict[str, Any]) -> bool:
        """Whether a quantization_config is of this format."""
        return quantization.get("quant_method") == "fp8" and quantization.get("expert_dtype", "fp8") == "fp8"

    def mismatches(self, config: Config) -> list[str]:
        tile = self._block_size
        pair = isinstance(tile, list) and len(tile) == 2 and all(type(side) is int and side > 0 for side in tile)
        if tile is None or pair:
            return []
        return [
            f"model.base: config.json has weight_block_size {shown(tile)} in its quantization_config. Possible are two whole "
            "numbers, rows and columns of a tile, and null. Copy the model again."
        ]

    @property
    def _block_size(self) -> Any:
        return self.quantization.get("weight_block_size", _USUAL_TILE)

    def tensors(self, base: Base) -> Mapping[str, StoredTensor]:
        last_reads, found = LastReads(_SCALES_KEPT), dict[str, StoredTensor](base.tensors)
        for name, source in base.tensors.items():
            if source.dtype == "F8_E4M3":
                found[name] = self._decoded(base, name, source, last_reads)
                for other in _beside(name):
                    found.pop(other, None)
        return found

    def _decoded(self, base: Base, name: str, source: TensorSource, last_reads: LastReads) -> Fp8Tiles:
        """Raises `ConfigError` unless a scale of `base` belongs to each tile."""
        scales = base.tensors.get(f"{name}_scale_inv")
        if scales is None or len(source.shape) < 2:
            raise ConfigError(
                f"model.base: {name} is in FP8 in {base.name}, and has no scales for its tiles, {name}_scale_inv. Copy the model "
                "again, or give the 16-bit model; quant.type quantizes it."
            )
        *matrices, rows, columns = source.shape
        tile = tuple(self._block_size or (rows, columns))
        expected = (*matrices, math.ceil(rows / tile[0]), math.ceil(columns / tile[1]))
        # A scale for a whole matrix has no place among others, and is stored with two dimensions, one or none.
        fits = numel(scales) == math.prod(expected) if self._block_size is None else scales.shape == expected
        if scales.dtype not in SCALES or not fits:
            raise ConfigError(
                f"model.base: the scales of {name} are {list(scales.shape)} of {scales.dtype} in {base.name}. Tiles of "
                f"{tile[0]} x {tile[1]} of its {list(source.shape)} have {list(expected)} of {', '.join(SCALES)}. Give the "
                "config.json that belongs to these files."
            )
        return Fp8Tiles(source, scales, (tile[0], tile[1]), last_reads)

    def check(self, base: Base, config: Config) -> None:
        pass


def _beside(name: str) -> tuple[str, str, str]:
    """The names of what the files may have beside a weight: its scales, and that of the inputs, which training does without."""
    module = name.removesuffix("weight")
    return f"{name}_scale_inv", f"{module}activation_scale", f"{module}input_scale"
