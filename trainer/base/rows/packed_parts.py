"""Weights that files hold in 4 bits as parts of a parameter: a mixture's experts, which older transformers quantized one by one."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.model.nf4 import NESTED_BLOCK, Format, dequantize_absmax, dequantize_blocks
from trainer.store.safetensors_index import Joined, PackedSources, PackedTensor, StoredTensor, Stretch, numel

Weight = StoredTensor | PackedTensor
_TYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class Unpacked:
    """The values of a weight in 4 bits, as bitsandbytes dequantizes them to the type that they were made of."""

    packed: PackedTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.packed.shape

    @property
    def dtype(self) -> str:
        return _TYPES[self._dtype]

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.packed.made_of)

    def read(self, begin: int, end: int) -> bytearray:
        packed, size = self.packed, self.packed.block_size
        first, last = begin // size, -(-end // size)
        start, stop = first * size, min(last * size, math.prod(self.shape))
        form = Format(packed.quant_type, size, packed.double, self._dtype)  # type: ignore[arg-type]
        half = _bytes(packed.sources.parts["weight"], start // 2, -(-stop // 2))
        values = dequantize_blocks(half, self._scales(first, last), stop - start, form)
        return bytearray(values[begin - start : end - start].view(torch.uint8).numpy())

    def _scales(self, first: int, last: int) -> Tensor:
        """fp32 absmax of the blocks [first, last)."""
        parts, mean = self.packed.sources.parts, self.packed.sources.mean
        if mean is None:
            return _bytes(parts["absmax"], 4 * first, 4 * last).view(torch.float32)
        nested, past = first // NESTED_BLOCK, -(-last // NESTED_BLOCK)
        codes = _bytes(parts["absmax"], nested * NESTED_BLOCK, last)
        absmax = dequantize_absmax(codes, _bytes(parts["nested_absmax"], 4 * nested, 4 * past).view(torch.float32))
        return absmax[first - nested * NESTED_BLOCK :] + mean[0]


def _bytes(source: StoredTensor, begin: int, end: int) -> Tensor:
    return torch.frombuffer(source.read(begin, end), dtype=torch.uint8)


def unpacked(weight: Weight) -> StoredTensor:
    return Unpacked(weight) if isinstance(weight, PackedTensor) else weight


def join_packed(parts: Sequence[Weight], stretches: Iterable[Stretch], shape: tuple[int, ...]) -> PackedTensor | None:
    """The stretches of `parts` as a stack of this shape in the 4 bits that they are in; None where that cannot be.

    A stack is quantized matrix by matrix. Its blocks are those of the parts where each of these is whole, and begins a block of its
    matrix; and those of its scales in 8 bits only where each is a whole matrix.
    """
    placed, at, size = list[PackedTensor](), 0, math.prod(shape[1:])
    for stretch in stretches:
        part = parts[stretch.part]
        if not isinstance(part, PackedTensor) or (stretch.begin, stretch.numel) != (0, math.prod(part.shape)):
            return None
        start = at % size
        if start % part.block_size or start + stretch.numel > size or (part.double and stretch.numel != size):
            return None
        placed.append(part)
        at += stretch.numel
    kinds = {(part.quant_type, part.block_size, part.double, part.made_of) for part in placed}
    if len(shape) != 3 or len(kinds) != 1:
        return None
    first, means = placed[0], [mean for part in placed for mean in part.sources.mean or ()]
    joined: dict[str, StoredTensor] = {
        name: _joined([part.sources.parts[name] for part in placed]) for name in first.sources.parts
    }
    return replace(first, shape=shape, sources=PackedSources(joined, means or None))


def _joined(sources: Sequence[StoredTensor]) -> Joined:
    """Bytes, one after another."""
    stretches = tuple(Stretch(index, 0, numel(source)) for index, source in enumerate(sources))
    return Joined(tuple(sources), stretches, (sum(stretch.numel for stretch in stretches),))
