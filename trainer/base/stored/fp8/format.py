"""Bases in FP8, as DeepSeek, Qwen, MiniMax and Mistral publish them: float8_e4m3, and a scale for each tile of a matrix.

Beside `q_proj.weight` (rows, columns) the files have `q_proj.weight_scale_inv`, by which a weight is multiplied: one number for each
tile of `weight_block_size` (config.json, quantization_config), usually 128 x 128, those at the borders cut off; or, where that
is null, one for the whole matrix. Tensors without a scale are in 16 or 32 bits.

Weights become bf16 as they are read: the product in fp32, rounded once. transformers' dequantize=True and DeepSeek's own
inference/fp8_cast_bf16.py give the same bits, the former where the tile divides both sides: it takes the shape of the scales
for a number of equal tiles, which is another tile for 192 rows (two of 96), and an error for 576.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.base.base import Base, QuantizedBy
from trainer.base.stored.shared.reads import LastReads
from trainer.config import Config
from trainer.errors import ConfigError, shown
from trainer.files.safetensors_index import StoredTensor, TensorSource, numel

if TYPE_CHECKING:
    from trainer.base.stored.fp8.tiles import Fp8Tiles

# Scales of so many matrices are kept, a few thousand numbers each: pieces of more are never in flight.
_SCALES_KEPT = 32
_USUAL_TILE = [128, 128]


@dataclass(frozen=True)
class Fp8:
    """Matrices in FP8, all else as in a plain base; `quantization` is what config.json says of it."""

    quantization: dict[str, Any]

    readable: ClassVar[str] = "FP8 with scales for tiles"
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

    def _decoded(self, base: Base, name: str, source: TensorSource, last_reads: LastReads) -> "Fp8Tiles":
        """Raises `ConfigError` unless a scale of `base` belongs to each tile."""
        # Only what reads weights loads numpy: `plan` does not, and answers sooner.
        from trainer.base.stored.fp8.tiles import Fp8Tiles
        from trainer.base.stored.shared.floats import SCALES

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


STORED: dict[str, QuantizedBy] = {"fp8": Fp8}
