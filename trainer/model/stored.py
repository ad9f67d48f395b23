"""Frozen weights that stay as the files of the base have them, in 4 or 8 bits, and are decoded when a layer computes.

As in trainer/model/nf4.py the codes and their scales are uint8 parameters that ZeRO-3 divides, and the layer and the
stack of experts are those of that file: what differs is how bytes become matrices.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from trainer.model.nf4 import Format, FrozenLinear4bit, FrozenStack4bit, Layout, Packed
from trainer.store.codes import VALUES, Kept, Numbers

# Weights that are decoded at once: their values and scales in fp32 are beside the result meanwhile
# (trainer/plan/memory.py).
_AT_ONCE = 2**23
_TYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U8": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class KeptFormat:
    """How the files hold the weights, and the type that they are multiplied in."""

    kept: Kept
    dtype: torch.dtype
    double = False  # no mean belongs to a slice


class StoredWeights(Packed):
    """Weights as their files have them. Parameters, each frozen, uint8, flat and partitioned by ZeRO-3, slice after
    slice:

    weight: the codes
    scales: one for each tile
    """

    format: KeptFormat  # type: ignore[assignment]
    scales: nn.Parameter

    def _pack(self, shape: tuple[int, int], slices: int, form: KeptFormat) -> None:  # type: ignore[override]
        self.format, self.slice_shape = form, shape
        self.layout = Layout(math.prod(shape), 1, slices)

    @property
    def sizes(self) -> dict[str, int]:
        return {name: size * self.layout.slices for name, size in self.format.kept.sizes(*self.slice_shape).items()}

    def matrices(self, first: int, last: int) -> Tensor:
        kept, (rows, columns) = self.format.kept, self.slice_shape
        stored = (columns, rows) if kept.transposed else (rows, columns)
        sizes, count = kept.sizes(rows, columns), last - first
        codes = self.weight.data[first * sizes["weight"] : last * sizes["weight"]].view(count * stored[0], -1)
        scales = self.scales.data[first * sizes["scales"] : last * sizes["scales"]].view(_TYPES[kept.scales])
        scales = scales.view(count, *kept.code.tiles(*stored))
        values = torch.empty(count * stored[0], stored[1], dtype=self.format.dtype, device=codes.device)
        at_once = max(1, _AT_ONCE // stored[1])
        for begin in range(0, len(values), at_once):
            numbers = torch.arange(begin, min(begin + at_once, len(values)), device=codes.device)
            of_rows = scales[numbers // stored[0], numbers % stored[0] // kept.code.tile[0]]
            values[begin : begin + at_once] = _decoded(kept, codes[begin : begin + at_once], of_rows, stored[1])
        found = values.view(count, *stored)
        return found.mT if kept.transposed else found


class StoredLinear(StoredWeights, FrozenLinear4bit):
    """A linear layer over such a weight."""


class StoredStack(StoredWeights, FrozenStack4bit):
    """A mixture's experts over such weights."""


def packed_module(model: nn.Module, name: str, parameter: Tensor, form: Format | KeptFormat) -> Packed:
    """The packed module put in place of a linear layer or a mixture's experts."""
    path, _, leaf = name.rpartition(".")
    owner, stays = model.get_submodule(path), isinstance(form, KeptFormat)
    given: Any = form  # each class takes its own kind
    if isinstance(owner, nn.Linear):
        layer = (StoredLinear if stays else FrozenLinear4bit)(owner.in_features, owner.out_features, given)
        layer.bias = owner.bias  # a parameter of its own
        model.set_submodule(path, layer)
        return layer
    experts, rows, columns = parameter.shape
    stack = (StoredStack if stays else FrozenStack4bit)((experts, rows, columns), given)
    delattr(owner, leaf)
    owner.add_module(leaf, stack)
    return stack


def _decoded(kept: Kept, codes: Tensor, scales: Tensor, columns: int) -> Tensor:
    """Rows of codes (n, bytes) with the scales of their tiles (n, columns of tiles) -> (n, columns), in the type that
    the files' values
    have: the product in fp32, rounded once."""
    values = _table(kept.code.numbers, codes.device).index_select(0, codes.flatten().int()).view(len(codes), columns)
    spread = scales.float()
    if spread.shape[1] > 1:
        spread = spread.repeat_interleave(kept.code.tile[1], 1)[:, :columns]
    return (values * spread).to(_TYPES[kept.dtype])


@cache
def _table(numbers: Numbers, device: torch.device) -> Tensor:
    """The values of the codes in each byte, fp32: (256, 2) of codes in 4 bits, (256, 1) of others."""
    values, byte = torch.tensor(VALUES[numbers], dtype=torch.float32), torch.arange(256)
    table = torch.stack([values[byte & 15], values[byte >> 4]], 1) if len(values) == 16 else values[:, None]
    return table.to(device)
