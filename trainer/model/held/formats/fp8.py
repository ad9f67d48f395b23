"""float8_e4m3 with a scale for each tile of 128 x 128 in `weight_scale_inv`, as DeepSeek-V3 is published. A base whose
files have it so is held by formats/stored.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trainer.model.held import Encodes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainer.model.held import NewTensor, WeightError


@dataclass(frozen=True)
class Fp8Tiles:
    """Its encoder: transformers' FineGrainedFP8Config and vLLM's and SGLang's `fp8` with a weight_block_size
    (docs.vllm.ai, features/quantization/fp8) read it.

    A scale is the tile's largest magnitude over 448, the largest of the type.
    """

    name: str = "fp8"
    tile: int = 128
    settings: tuple[str, ...] = ()

    def with_settings(self, block_size: int, double: bool) -> Fp8Tiles:
        return self

    def encoder(self, dtype: torch.dtype) -> Fp8Tiles:
        return self

    def takes(self, shape: tuple[int, int]) -> bool:
        # transformers 5.24 takes the shape of the scales for a number of equal tiles, which others are not.
        return shape[0] % self.tile == 0 and shape[1] % self.tile == 0

    def at_once(self, shape: tuple[int, int]) -> int:
        return self.tile * shape[1]

    def entries(self, name: str, shape: tuple[int, int]) -> list[NewTensor]:
        from trainer.model.held import NewTensor

        tiles = (shape[0] // self.tile, shape[1] // self.tile)
        return [NewTensor(name, "F8_E4M3", shape), NewTensor(f"{name}_scale_inv", "F32", tiles)]

    def encode(self, pieces: Iterator[Tensor], shape: tuple[int, int], error: WeightError) -> Iterator[bytes]:
        import torch

        from trainer.model.held import as_bytes

        largest, scales = torch.finfo(torch.float8_e4m3fn).max, list[torch.Tensor]()
        for weights in pieces:
            tiles = weights.float().view(-1, self.tile, shape[1] // self.tile, self.tile)
            scale = tiles.abs().amax((1, 3), keepdim=True) / largest
            scale[scale == 0] = 1
            stored = (tiles / scale).clamp(-largest, largest).to(torch.float8_e4m3fn)
            error.add(tiles, stored.float() * scale)
            scales.append(scale.flatten())
            yield as_bytes(stored)
        yield as_bytes(torch.cat(scales))

    def configuration(self, untouched: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [self.tile, self.tile],
            "modules_to_not_convert": untouched,
        }


ENCODERS: dict[str, Encodes] = {"fp8": Fp8Tiles()}
