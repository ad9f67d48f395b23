"""Bases in FP8, as DeepSeek, Qwen, MiniMax and Mistral publish them: float8_e4m3, with a scale for each tile.

Beside `q_proj.weight` (rows, columns) the files have `q_proj.weight_scale_inv`, by which weights are multiplied. It has
one number for each tile of `weight_block_size` (config.json, quantization_config), usually 128 x 128; tiles at the
borders are cut off. If the setting is null, it has one number for the whole matrix. DeepSeek-V4 calls it
`q_proj.scale`, Mistral `q_proj.qscale_weight`. Tensors without a scale are in 16 or 32 bits.

With the `expert_dtype` fp4 the experts of a mixture are in 4 bits, as in DeepSeek-V4: two E2M1 numbers in each byte of
an I8, and a power of two for each 32 weights of a row. DeepSeek-V4 says so at the top of config.json, later bases in
the quantization_config.

Weights become bf16 when they are read: the product is computed in fp32 and rounded once. DeepSeek's own
inference/fp8_cast_bf16.py gives the same bits. So does transformers' dequantize=True if the tile divides both sides. It
derives the size of equal tiles from the shape of the scales, which gives other tiles for 192 rows (two of 96), and an
error for 576.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from trainer.base.architecture import Parameter
from trainer.base.base import Base, StoredFormat
from trainer.base.stored.shared.cached_values import LastReads
from trainer.base.stored.shared.skipped_layers import is_listed
from trainer.config import Config
from trainer.errors import ConfigError, shown
from trainer.model.held.codes import Code, KeptWeight, Numbers
from trainer.store.safetensors_index import StoredTensor, TensorSource, numel

_USUAL_TILE = [128, 128]
_FP4_TILE = (1, 32)
_EXPERTS = ("fp8", "fp4")
# The scales of inputs that the files may have beside a weight. Training does not use them.
_OF_INPUTS = ("activation_scale", "input_scale", "qscale_act")


class Fp8(StoredFormat):
    """Matrices in FP8. All other weights are as in a plain base."""

    readable: ClassVar[str] = "FP8 with scales for tiles (with experts in FP4 too)"
    dequantizes: ClassVar[bool] = True

    @staticmethod
    def stores(quantization: dict[str, Any]) -> bool:
        return quantization.get("quant_method") == "fp8" and quantization.get("expert_dtype", "fp8") in _EXPERTS

    def mismatches(self, config: Config) -> list[str]:
        if self._has_tile:
            return []
        return [
            f"model.base: config.json has weight_block_size {shown(self._block_size)} in its quantization_config."
            " Possible are two whole numbers, rows and columns of a tile, and null. Copy the model again."
        ]

    @property
    def _block_size(self) -> Any:
        return self.quantization.get("weight_block_size", _USUAL_TILE)

    @property
    def _has_tile(self) -> bool:
        tile = self._block_size
        pair = isinstance(tile, list) and len(tile) == 2 and all(type(side) is int and side > 0 for side in tile)
        return tile is None or pair

    @property
    def _codes(self) -> dict[str, Numbers]:
        """The types of the codes in the files, and the kinds of numbers that they encode."""
        fp4: dict[str, Numbers] = {"I8": "e2m1"} if self.quantization.get("expert_dtype") == "fp4" else {}
        return {"F8_E4M3": "e4m3", **fp4}

    def kept(self, parameter: Parameter) -> KeptWeight | None:
        if (
            not self._has_tile
            or not parameter.matrices
            or is_listed(parameter, self.quantization.get("modules_to_not_convert"))
        ):
            return None
        scales = "F8_E8M0" if self.quantization.get("scale_fmt") == "ue8m0" else "F32"
        if parameter.kind == "experts" and "I8" in self._codes:
            return KeptWeight(Code("e2m1", _FP4_TILE), "F8_E8M0", "BF16")
        rows, columns = parameter.shape[-2:]
        tile = tuple(self._block_size or (rows, columns))
        return KeptWeight(Code("e4m3", (tile[0], tile[1])), scales, "BF16")

    def tensors(self, base: Base) -> Mapping[str, StoredTensor]:
        last_reads, found = LastReads(), dict[str, StoredTensor](base.tensors)
        for name, source in base.tensors.items():
            if source.dtype in self._codes:
                found[name] = self._decoded(base, name, source, last_reads)
                for other in (*_scale_names(name), *(name.removesuffix("weight") + leaf for leaf in _OF_INPUTS)):
                    found.pop(other, None)
        return found

    def _decoded(self, base: Base, name: str, source: TensorSource, last_reads: LastReads) -> StoredTensor:
        """The decoded weight. Raises `ConfigError` unless `base` has a scale for each tile."""
        # Only code that reads weights imports numpy. `plan` does not, and answers sooner.
        from trainer.base.stored.shared.coded import SCALES, Coded

        scales = next((base.tensors[other] for other in _scale_names(name) if other in base.tensors), None)
        if scales is None or len(source.shape) < 2:
            raise ConfigError(
                f"model.base: {name} is in FP8 in {base.name}, and has no scales for its tiles, {name}_scale_inv. Copy"
                " the model again, or give the 16-bit model; quant.type quantizes it."
            )
        *matrices, rows, columns = source.shape
        numbers = self._codes[source.dtype]
        columns *= 2 if numbers == "e2m1" else 1
        whole = self._block_size is None and numbers == "e4m3"
        tile = _FP4_TILE if numbers == "e2m1" else tuple(self._block_size or (rows, columns))
        code = Code(numbers, (tile[0], tile[1]))
        expected = (*matrices, *code.tiles(rows, columns))
        # A scale for a whole matrix may be stored with two dimensions, one or none.
        fits = numel(scales) == math.prod(expected) if whole else scales.shape == expected
        if scales.dtype not in SCALES or not fits:
            raise ConfigError(
                f"model.base: the scales of {name} are {list(scales.shape)} of {scales.dtype} in {base.name}. Tiles of"
                f" {tile[0]} x {tile[1]} of its {[*matrices, rows, columns]} have {list(expected)} of"
                f" {', '.join(SCALES)}. Give the config.json that belongs to these files."
            )
        return Coded(source, scales, (*matrices, rows, columns), code, last_reads)


def _scale_names(name: str) -> tuple[str, ...]:
    """The possible names of a weight's scales."""
    module = name.removesuffix("weight")
    return f"{name}_scale_inv", f"{module}scale", f"{module}qscale_weight"


STORED: dict[str, type[StoredFormat]] = {"fp8": Fp8}
