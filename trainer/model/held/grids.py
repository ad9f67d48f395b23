"""Encoders of linear layers in INT4, NVFP4, MXFP4 and FP8. A change of a weight moves its codes by a dither.

The base's weights give the scales and the nearest codes. Then the change moves the codes, as it moves those of a base
that is stored in these codes (trainer/model/held/dither.py). INT4, NVFP4 and MXFP4 are written as llm-compressor does
(compressed-tensors), FP8 as DeepSeek and transformers do.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.model.held import NewTensor, WeightError, as_bytes, dither
from trainer.model.held.codes import VALUES, Code

_LARGEST_E4M3 = 448.0
_LEAST = 2.0**-100
"""Tiles of smaller weights are taken for tiles of this size, so that every scale is a normal number of its type."""


class RowsMoved(Protocol):
    """How the rows of a matrix change."""

    def of_rows(self, first: int, count: int, values: Callable[[], Tensor]) -> Tensor:
        """Return the change of some rows, fp32 (count, columns). `values` makes the rows themselves, fp32, if
        needed."""
        ...

    def thresholds(self, rows: Tensor, columns: Tensor) -> Tensor | None:
        """Return the dither's thresholds at these places; None rounds the changed weight to the nearest code."""
        ...


@dataclass(frozen=True)
class Grid:
    """An `Encoder`: codes, a scale for each tile, and the names of both in files.

    `scaled` makes the scales, as they are stored, from the largest magnitude of each tile, which is not 0. The weights
    of a tile may all be 0. Then its scale is that of the change alone, which would be lost by any much smaller scale.
    """

    name: str
    code: Code
    codes: tuple[str, str, int]
    """The ending of the codes' name, their type, and how many of them an element of it has."""
    scales: tuple[str, str]
    scaled: Callable[[Tensor], Tensor]
    described: Callable[[list[str]], dict[str, Any]]
    says_shape: bool = False
    second: str | None = None
    """The ending of the name of one fp32 number for the matrix. It divides the scales, which it brings into the range
    of their type."""
    second_number: float = 1.0
    """That number, if the format has it."""
    by: RowsMoved | None = None
    seen: Callable[[int, int], None] = lambda codes, moved: None
    """It is called with the number of codes that were made, and of those that `by` has moved."""

    def takes(self, shape: tuple[int, int]) -> bool:
        return all(size % side == 0 for size, side in zip(shape, self.code.tile, strict=True))

    def at_once(self, shape: tuple[int, int]) -> int:
        return self.code.tile[0] * shape[1]

    def entries(self, name: str, shape: tuple[int, int]) -> list[NewTensor]:
        rows, columns = shape
        (leaf, dtype, each), (beside, scale_type) = self.codes, self.scales
        path = name.removesuffix("weight")
        found = [NewTensor(f"{path}{leaf}", dtype, (rows, columns // each))]
        found.append(NewTensor(f"{path}{beside}", scale_type, self.code.tiles(rows, columns)))
        if self.second is not None:
            found.append(NewTensor(f"{path}{self.second}", "F32", (1,)))
        return [*found, NewTensor(f"{path}weight_shape", "I64", (2,))] if self.says_shape else found

    def encode(self, pieces: Iterator[Tensor], shape: tuple[int, int], error: WeightError) -> Iterator[bytes]:
        (down, across), columns, first = self.code.tile, torch.arange(shape[1]), 0
        second = torch.tensor([self.second_number])
        values, made = torch.tensor(VALUES[self.code.numbers], dtype=torch.float32), list[Tensor]()
        for piece in pieces:
            weights = piece.float().view(-1, shape[1])
            rows = torch.arange(first, first + len(weights))
            change = torch.zeros_like(weights)
            if self.by is not None:
                change = self.by.of_rows(first, len(weights), weights.clone)
            stored = self.scaled(self._largest(weights, change) * second)
            spread = (_as_numbers(stored) / second).repeat_interleave(down, 0).repeat_interleave(across, 1)
            at = None if self.by is None else self.by.thresholds(rows, columns)
            codes = before = self._nearest(weights, spread)
            if at is not None:
                codes = dither.moved(self.code.numbers, before, change / spread, at)
            elif self.by is not None:
                codes = self._nearest(weights + change, spread)
            self.seen(codes.numel(), int(codes.ne(before).sum()))
            error.add(weights + change, values[codes.int()] * spread)
            made.append(stored)
            first += len(weights)
            yield as_bytes(dither.packed(codes, self.code.bits))
        yield as_bytes(torch.cat(made))
        if self.second is not None:
            yield as_bytes(second)
        if self.says_shape:
            yield as_bytes(torch.tensor(shape))

    def _largest(self, weights: Tensor, change: Tensor) -> Tensor:
        """The largest magnitude of each tile: of its weights, else of their change, else 1."""
        (down, across), columns = self.code.tile, weights.shape[1]
        of_weights, of_change = (
            values.view(-1, down, columns // across, across).abs().amax((1, 3)) for values in (weights, change)
        )
        largest = torch.where(of_weights != 0, of_weights, of_change)
        return torch.where(largest != 0, largest, 1.0).clamp_(min=_LEAST)

    def _nearest(self, weights: Tensor, scales: Tensor) -> Tensor:
        zero = VALUES[self.code.numbers].index(0)
        codes = torch.full(weights.shape, zero, dtype=torch.uint8)
        return dither.moved(self.code.numbers, codes, weights / scales, None)

    def configuration(self, untouched: list[str]) -> dict[str, Any]:
        return self.described(untouched)


def _as_numbers(scales: Tensor) -> Tensor:
    """Stored scales in fp32; bytes are exponents plus 127."""
    return torch.exp2(scales.float() - 127) if scales.dtype == torch.uint8 else scales.float()


def _of_int4(largest: Tensor) -> Tensor:
    """Return the scales of codes from -8 to 7: at most half a step is lost at either end."""
    return (largest / 7.5).bfloat16()


def _of_nvfp4(largest: Tensor) -> Tensor:
    """Return the scales of codes up to 6. None is 0, which would make its weights 0."""
    return (largest / 6).clamp_(2.0**-9, _LARGEST_E4M3).to(torch.float8_e4m3fn)


def second_of_nvfp4(largest: float) -> float:
    """Return the number by which the scales of a matrix are divided: the scale of its largest weight is then 448."""
    return _LARGEST_E4M3 * 6 / largest if largest else 1.0


def _of_mxfp4(largest: Tensor) -> Tensor:
    """Return the exponent of the largest weight less that of the largest code (OCP Microscaling 1.0, section 6.3)."""
    return (largest.log2().floor() - 2 + 127).to(torch.uint8)


def _of_fp8(largest: Tensor) -> Tensor:
    return largest / _LARGEST_E4M3


def _compressed(form: str, **weights: Any) -> Callable[[list[str]], dict[str, Any]]:
    """Return the quantization_config of compressed-tensors, as llm-compressor writes it."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}

    def described(untouched: list[str]) -> dict[str, Any]:
        return {
            "quant_method": "compressed-tensors",
            "format": form,
            "quantization_status": "compressed",
            "ignore": untouched,
            "config_groups": {"group_0": group},
        }

    return described


def _tiles_of_fp8(untouched: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": untouched,
    }


GRIDS: Mapping[str, Grid] = {
    "int4": Grid(
        "int4",
        Code("int4", (1, 32)),
        ("weight_packed", "I32", 8),
        ("weight_scale", "BF16"),
        _of_int4,
        _compressed(
            "pack-quantized", num_bits=4, type="int", symmetric=True, strategy="group", group_size=32, dynamic=False
        ),
        says_shape=True,
    ),
    "nvfp4": Grid(
        "nvfp4",
        Code("e2m1", (1, 16)),
        ("weight_packed", "U8", 2),
        ("weight_scale", "F8_E4M3"),
        _of_nvfp4,
        _compressed(
            "nvfp4-pack-quantized",
            num_bits=4,
            type="float",
            symmetric=True,
            strategy="tensor_group",
            group_size=16,
            dynamic=False,
        ),
        second="weight_global_scale",
    ),
    "mxfp4": Grid(
        "mxfp4",
        Code("e2m1", (1, 32)),
        ("weight_packed", "U8", 2),
        ("weight_scale", "U8"),
        _of_mxfp4,
        _compressed(
            "mxfp4-pack-quantized",
            num_bits=4,
            type="float",
            symmetric=True,
            strategy="group",
            group_size=32,
            dynamic=False,
        ),
    ),
    "fp8": Grid(
        "fp8",
        Code("e4m3", (128, 128)),
        ("weight", "F8_E4M3", 1),
        ("weight_scale_inv", "F32"),
        _of_fp8,
        _tiles_of_fp8,
    ),
}
