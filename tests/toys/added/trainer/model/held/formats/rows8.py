"""A toy way to hold a weight: whole numbers of 8 bits with an fp32 scale for each row. Exported, a linear layer is as
compressed-tensors has INT8 by channel, which Capstan reads as a base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.model.held import Encodes, HeldFormat

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from trainer.model.held import NewTensor, WeightError
    from trainer.model.held.layers import HeldWeights


class Rows8(HeldFormat):
    in_words: ClassVar[str] = "in 8 bits by row"  # type: ignore[misc]
    settings: tuple[str, ...] = ("cache",)

    def sizes(self, rows: int, columns: int) -> dict[str, int]:
        return {"weight": rows * columns, "scales": 4 * rows}

    def unit(self, rows: int, columns: int) -> int:
        return columns

    def unit_bytes(self, rows: int, columns: int) -> dict[str, int]:
        return {"weight": columns, "scales": 4}

    def encode(self, weights: Tensor, columns: int) -> dict[str, Tensor]:
        import torch

        values = weights.float().view(-1, columns)
        scales = (values.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
        codes = (values / scales).round().to(torch.int8)
        return {"weight": codes.flatten().view(torch.uint8), "scales": scales.flatten().view(torch.uint8)}

    def decode(self, parts: Mapping[str, Tensor], numel: int, columns: int, dtype: torch.dtype) -> Tensor:
        import torch

        codes, scales = parts["weight"].view(torch.int8).view(-1, columns), parts["scales"].view(torch.float32)
        return (codes.float() * scales[:, None]).to(dtype).flatten()

    def matrices(self, held: HeldWeights, first: int, last: int) -> Tensor:
        rows, columns = held.slice_shape
        begin, end = first * rows, last * rows
        parts = {
            "weight": held.part("weight")[begin * columns : end * columns],
            "scales": held.part("scales")[4 * begin : 4 * end],
        }
        found = self.decode(parts, (end - begin) * columns, columns, held.dtype)
        return found.view(last - first, rows, columns)

    def encoder(self, dtype: torch.dtype) -> Rows8Files:
        return Rows8Files(self)


class Rows8Files:
    name = "rows8"

    def __init__(self, form: Rows8) -> None:
        self._form = form

    def takes(self, shape: tuple[int, int]) -> bool:
        return True

    def at_once(self, shape: tuple[int, int]) -> int:
        return shape[1]

    def entries(self, name: str, shape: tuple[int, int]) -> list[NewTensor]:
        from trainer.model.held import NewTensor

        return [NewTensor(name, "I8", shape), NewTensor(f"{name}_scale", "F32", (shape[0], 1))]

    def encode(self, pieces: Iterator[Tensor], shape: tuple[int, int], error: WeightError) -> Iterator[bytes]:
        from trainer.model.held import as_bytes

        scales = list[bytes]()
        for weights in pieces:
            parts = self._form.encode(weights, shape[1])
            error.add(weights, self._form.decode(parts, len(weights), shape[1], weights.dtype))
            scales.append(as_bytes(parts["scales"]))
            yield as_bytes(parts["weight"])
        yield b"".join(scales)

    def configuration(self, untouched: list[str]) -> dict[str, Any]:
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
        return {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": untouched,
        }


ABOUT = {"rows8": "8 bits a weight, with a scale for each row"}
HELD = {"rows8": Rows8()}
ENCODERS: dict[str, Encodes] = {"rows8": Rows8()}
