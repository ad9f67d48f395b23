"""The codes in which an export stores matrices in fewer bits, as other programs read them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.export.write.recoded import NewTensor, WeightError
from trainer.model.held.blockwise import NESTED_BLOCK, four_bit_code, nested_code, quantize_absmax
from trainer.model.nf4 import Format, Layout

_STATE_BYTES = 256  # JSON, filled up with spaces: under double quantization a number in it is known at the end alone
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@dataclass(frozen=True)
class BitsAndBytes:
    """Blocks of the flattened matrix, as bitsandbytes quantizes and transformers' `save_pretrained` writes them: beside
    `weight` its `absmax`, `quant_map` and the JSON of its quant_state (bitsandbytes/functional.py, QuantState.as_dict).
    Before they are quantized the weights are rounded to the type of the products, as transformers does."""

    form: Format

    @property
    def name(self) -> str:
        return self.form.quant_type

    def takes(self, shape: tuple[int, int]) -> bool:
        # On a CPU, bitsandbytes 0.50 misreads matrices whose rows are not whole blocks.
        return shape[1] % self.form.block_size == 0

    def at_once(self, shape: tuple[int, int]) -> int:
        return self.form.block_size

    def entries(self, name: str, shape: tuple[int, int]) -> list[NewTensor]:
        layout = Layout(shape[0] * shape[1], self.form.block_size)
        absmax = NewTensor(f"{name}.absmax", "U8" if self.form.double else "F32", (layout.blocks,))
        nested = [
            NewTensor(f"{name}.nested_absmax", "F32", (layout.nested_blocks,)),
            NewTensor(f"{name}.nested_quant_map", "F32", (256,)),
        ]
        return [
            NewTensor(name, "U8", (layout.packed_bytes, 1)),
            absmax,
            NewTensor(f"{name}.quant_map", "F32", (16,)),
            *(nested if self.form.double else []),
            NewTensor(f"{name}.quant_state.bitsandbytes__{self.name}", "U8", (_STATE_BYTES,)),
        ]

    def encode(self, pieces: Iterator[Tensor], shape: tuple[int, int], error: WeightError) -> Iterator[bytes]:
        form, scales = self.form, list[Tensor]()
        for weights in pieces:
            packed, absmax = form.quantize(weights.to(form.dtype))
            error.add(weights, form.dequantize(packed, absmax, weights.numel()))
            scales.append(absmax)
            yield _bytes(packed)
        absmax, facts, nested = torch.cat(scales), dict[str, Any](), list[Tensor]()
        if form.double:
            absmax, nested_absmax, mean = quantize_absmax(absmax)
            nested = [nested_absmax, nested_code(absmax.device)]
            facts = {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(mean)}
        yield _bytes(absmax)
        yield _bytes(four_bit_code(self.name, torch.device("cpu")))
        yield from map(_bytes, nested)
        known = {
            "quant_type": self.name,
            "blocksize": form.block_size,
            "dtype": _DTYPES[form.dtype],
            "shape": list(shape),
        }
        text = json.dumps({**known, **facts}).encode()
        assert len(text) <= _STATE_BYTES
        yield text.ljust(_STATE_BYTES)

    def configuration(self, untouched: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.name,
            "bnb_4bit_use_double_quant": self.form.double,
            "bnb_4bit_compute_dtype": _DTYPES[self.form.dtype],
            "llm_int8_skip_modules": untouched,
        }


@dataclass(frozen=True)
class Fp8Blocks:
    """float8_e4m3 with a scale for each tile of 128 x 128 in `weight_scale_inv`, as DeepSeek-V3 is published:
    transformers' FineGrainedFP8Config and vLLM's and SGLang's `fp8` with a weight_block_size (docs.vllm.ai,
    features/quantization/fp8) read it.

    A scale is the tile's largest magnitude over 448, the largest of the type.
    """

    name: str = "fp8"
    tile: int = 128

    def takes(self, shape: tuple[int, int]) -> bool:
        # transformers 5.24 takes the shape of the scales for a number of equal tiles, which others are not.
        return shape[0] % self.tile == 0 and shape[1] % self.tile == 0

    def at_once(self, shape: tuple[int, int]) -> int:
        return self.tile * shape[1]

    def entries(self, name: str, shape: tuple[int, int]) -> list[NewTensor]:
        tiles = (shape[0] // self.tile, shape[1] // self.tile)
        return [NewTensor(name, "F8_E4M3", shape), NewTensor(f"{name}_scale_inv", "F32", tiles)]

    def encode(self, pieces: Iterator[Tensor], shape: tuple[int, int], error: WeightError) -> Iterator[bytes]:
        largest, scales = torch.finfo(torch.float8_e4m3fn).max, list[Tensor]()
        for weights in pieces:
            tiles = weights.float().view(-1, self.tile, shape[1] // self.tile, self.tile)
            scale = tiles.abs().amax((1, 3), keepdim=True) / largest
            scale[scale == 0] = 1
            stored = (tiles / scale).clamp(-largest, largest).to(torch.float8_e4m3fn)
            error.add(tiles, stored.float() * scale)
            scales.append(scale.flatten())
            yield _bytes(stored.view(torch.uint8))
        yield _bytes(torch.cat(scales))

    def configuration(self, untouched: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [self.tile, self.tile],
            "modules_to_not_convert": untouched,
        }


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
