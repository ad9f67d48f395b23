"""Weights in blocks that share a scale (absmax), as bitsandbytes quantizes them: nf4 and fp4 in 4 bits, int8 in 8.

The arithmetic is QLoRA's (arXiv:2305.14314): blocks of `block_size` weights share one fp32 absmax; with double
quantization the absmax, less its mean over the tensor, is itself stored in 8 bits in blocks of 256. int8 has the same
blocks, whose weights are whole numbers from -127 to 127 of the absmax over 127: bitsandbytes' blockwise quantization by
its linear map.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

from trainer.model.held import Encodes, HeldFormat, Moves, Spanning

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainer.model.held import NewTensor, WeightError
    from trainer.model.held.layers import HeldWeights

NESTED_BLOCK = 256  # bitsandbytes' block of absmax values under double quantization
_STATE_BYTES = 256  # JSON, filled up with spaces: under double quantization a number in it is known only at the end


@dataclass(frozen=True)
class Blocks(HeldFormat):
    """Each matrix lies flat, slice after slice, in parameters that are frozen, uint8 and partitioned by ZeRO-3:

    weight: two weights a byte, or of int8 one; an odd last nibble is padded, the last block may be short
    absmax: fp32 scales as bytes; or 8-bit codes, under double quantization
    nested_absmax: fp32 scales of the scales as bytes, only under double quantization
    """

    quant_type: str
    block_size: int = 64
    double: bool = False

    @property
    def in_words(self) -> str:
        return f"in {self.quant_type}"

    @property
    def means(self) -> bool:  # type: ignore[override]
        return self.double

    @property
    def settings(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("block_size", "cache") if self.quant_type == "int8" else ("block_size", "double", "cache")

    @property
    def in_linear4bit(self) -> bool:  # type: ignore[override]
        return self.quant_type != "int8"

    def unread(self, setting: str) -> str | None:
        if setting not in self.settings:
            return "It is for the scales of 4 bits. Remove it, or set quant.block_size: 256 for fewer scales."
        return None

    def with_settings(self, block_size: int, double: bool) -> Blocks:
        return replace(self, block_size=block_size, double=double)

    @property
    def weights_a_byte(self) -> int:
        return 1 if self.quant_type == "int8" else 2

    def blocks(self, numel: int) -> int:
        return ceil(numel / self.block_size)

    def sizes(self, rows: int, columns: int) -> dict[str, int]:
        weight, blocks = ceil(rows * columns / self.weights_a_byte), self.blocks(rows * columns)
        if not self.double:
            return {"weight": weight, "absmax": 4 * blocks}
        return {"weight": weight, "absmax": blocks, "nested_absmax": 4 * ceil(blocks / NESTED_BLOCK)}

    def unit(self, rows: int, columns: int) -> int:
        return self.block_size

    def unit_bytes(self, rows: int, columns: int) -> dict[str, int]:
        weight = self.block_size // self.weights_a_byte
        return {"weight": weight} if self.double else {"weight": weight, "absmax": 4}

    def encode(self, weights: Tensor, columns: int) -> dict[str, Tensor]:
        import torch

        from trainer.model.held.blockwise import quantize_blocks

        packed, absmax = quantize_blocks(weights, self.quant_type, self.block_size)
        return {"weight": packed, "absmax": absmax.view(torch.uint8)}

    def decode(self, parts: Mapping[str, Tensor], numel: int, columns: int, dtype: torch.dtype) -> Tensor:
        import torch

        from trainer.model.held.blockwise import dequantize_blocks

        absmax = parts["absmax"].view(torch.float32)
        return dequantize_blocks(parts["weight"], absmax, numel, self.quant_type, self.block_size, dtype)

    @property
    def spanning(self) -> Spanning | None:
        return _Nested() if self.double else None

    def matrices(self, held: HeldWeights, first: int, last: int) -> Tensor:
        """As `HeldFormat.matrices`. They are dequantized as one row, as they were quantized. On a CPU, bitsandbytes
        0.50 begins a block with every row, which is wrong for rows that are not whole blocks."""
        import torch

        count, numel = last - first, held.numel
        blocks = self.blocks(numel)
        # Neighbours are dequantized as one where each is whole blocks, of absmax too.
        if count > 1 and (numel % self.block_size or (self.double and blocks % NESTED_BLOCK)):
            return torch.cat([self.matrices(held, index, index + 1) for index in range(first, last)])
        parts = {"weight": self._packed(held, first, last), "absmax": self._scales(held, first, last)}
        return self.decode(parts, count * numel, held.slice_shape[1], held.dtype).view(count, *held.slice_shape)

    def by_kernel(self, held: HeldWeights, first: int, last: int, by: Moves | None) -> Tensor | None:
        """As `HeldFormat.by_kernel`. Under double quantization each block makes its own scale, while bitsandbytes first
        makes all of them, in two kernels and two arrays of fp32. The operations and their order are the same."""
        import torch

        from trainer.model.held.blockwise import four_bit_code, int8_code, nested_code
        from trainer.model.kernels.decode import Nested, Numbers, decode_matrices, tiling

        assert by is None
        packed, nested = self._packed(held, first, last), None
        if self.double:
            scales, of_scales = self._nested(held, first, last)
            nested = Nested(of_scales, held.absmax_mean[first:last], nested_code(packed.device), NESTED_BLOCK)
        else:
            scales = self._scales(held, first, last).view(torch.float32)
        in_8_bits = self.quant_type == "int8"
        table = int8_code(packed.device) if in_8_bits else four_bit_code(self.quant_type, packed.device)
        numbers = Numbers(self.quant_type, 8 // self.weights_a_byte, held.dtype, table, upper_first=True)
        tiles = tiling((1, held.numel), (1, self.block_size), numbers.bits)
        assert tiles is not None
        shape = (last - first, *held.slice_shape)
        return decode_matrices(packed, scales, numbers, tiles, shape, held.dtype, nested)

    def _packed(self, held: HeldWeights, first: int, last: int) -> Tensor:
        """The codes of slices [first, last)."""
        size = ceil(held.numel / self.weights_a_byte)
        return held.part("weight")[first * size : last * size]

    def _nested(self, held: HeldWeights, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The codes of the scales of slices [first, last), and their fp32 scales."""
        import torch

        blocks = self.blocks(held.numel)
        nested = ceil(blocks / NESTED_BLOCK)
        scales = held.part("nested_absmax").view(torch.float32)[first * nested : last * nested]
        return held.part("absmax")[first * blocks : last * blocks], scales

    def _scales(self, held: HeldWeights, first: int, last: int) -> Tensor:
        """fp32 absmax of slices [first, last), as bytes."""
        import torch

        from trainer.model.held.blockwise import dequantize_absmax

        blocks = self.blocks(held.numel)
        if not self.double:
            return held.part("absmax")[4 * first * blocks : 4 * last * blocks]
        scales = dequantize_absmax(*self._nested(held, first, last))
        return (scales.view(-1, blocks) + held.absmax_mean[first:last, None]).view(-1).view(torch.uint8)

    def encoder(self, dtype: torch.dtype) -> BitsAndBytes:
        return BitsAndBytes(self, dtype)


class _Nested:
    """Double quantization."""

    part = "absmax"

    def finish(self, scales: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        import torch

        from trainer.model.held.blockwise import quantize_absmax

        codes, nested, mean = quantize_absmax(scales)
        return {"absmax": codes, "nested_absmax": nested.view(torch.uint8)}, mean

    def left(self, scales: Tensor) -> Tensor:
        from trainer.model.held.blockwise import dequantize_absmax, quantize_absmax

        codes, nested, mean = quantize_absmax(scales)
        return dequantize_absmax(codes, nested) + mean


@dataclass(frozen=True)
class BitsAndBytes:
    """Writes such blocks to files, as transformers' `save_pretrained` does: beside `weight` its `absmax`, `quant_map`
    and the JSON of its quant_state (bitsandbytes/functional.py, QuantState.as_dict). Before they are quantized the
    weights are rounded to the type of the products, as transformers does."""

    form: Blocks
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.form.quant_type

    def takes(self, shape: tuple[int, int]) -> bool:
        # On a CPU, bitsandbytes 0.50 misreads matrices whose rows are not whole blocks.
        return shape[1] % self.form.block_size == 0

    def at_once(self, shape: tuple[int, int]) -> int:
        return self.form.block_size

    def entries(self, name: str, shape: tuple[int, int]) -> list[NewTensor]:
        from trainer.model.held import NewTensor

        sizes = self.form.sizes(*shape)
        double = self.form.double
        absmax = NewTensor(f"{name}.absmax", "U8" if double else "F32", (self.form.blocks(shape[0] * shape[1]),))
        nested = [
            NewTensor(f"{name}.nested_absmax", "F32", (sizes.get("nested_absmax", 0) // 4,)),
            NewTensor(f"{name}.nested_quant_map", "F32", (256,)),
        ]
        return [
            NewTensor(name, "U8", (sizes["weight"], 1)),
            absmax,
            NewTensor(f"{name}.quant_map", "F32", (16,)),
            *(nested if double else []),
            NewTensor(f"{name}.quant_state.bitsandbytes__{self.name}", "U8", (_STATE_BYTES,)),
        ]

    def encode(self, pieces: Iterator[Tensor], shape: tuple[int, int], error: WeightError) -> Iterator[bytes]:
        import torch

        from trainer.model.held import as_bytes
        from trainer.model.held.blockwise import four_bit_code, nested_code

        form, scales, columns = self.form, list[torch.Tensor](), shape[1]
        for weights in pieces:
            parts = form.encode(weights.to(self.dtype), columns)
            error.add(weights, form.decode(parts, weights.numel(), columns, self.dtype))
            scales.append(parts["absmax"])
            yield as_bytes(parts["weight"])
        absmax, facts, nested = torch.cat(scales), dict[str, Any](), list[torch.Tensor]()
        if form.spanning:
            spanned, mean = form.spanning.finish(absmax.view(torch.float32))
            absmax, nested = spanned["absmax"], [spanned["nested_absmax"], nested_code(absmax.device)]
            facts = {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": float(mean)}
        yield as_bytes(absmax)
        yield as_bytes(four_bit_code(self.name, torch.device("cpu")))
        yield from map(as_bytes, nested)
        known = {
            "quant_type": self.name,
            "blocksize": form.block_size,
            "dtype": self._dtype,
            "shape": list(shape),
        }
        text = json.dumps({**known, **facts}).encode()
        assert len(text) <= _STATE_BYTES
        yield text.ljust(_STATE_BYTES)

    @property
    def _dtype(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def configuration(self, untouched: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.name,
            "bnb_4bit_use_double_quant": self.form.double,
            "bnb_4bit_compute_dtype": self._dtype,
            "llm_int8_skip_modules": untouched,
        }


ABOUT = {
    "nf4": "quantized to 4 bits a weight, by the quantiles of a normal distribution (QLoRA)",
    "fp4": "quantized to 4 bits a weight, as floating-point numbers",
    "int8": "quantized to 8 bits a weight, as whole numbers",
}
HELD = {name: Blocks(name) for name in ("nf4", "fp4", "int8")}
ENCODERS: dict[str, Encodes] = {"nf4": Blocks("nf4")}
