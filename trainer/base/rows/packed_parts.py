"""Joins weights that files hold in 4 or 8 bits into one parameter: a mixture's experts, which are stored one by one.

An expert that bitsandbytes quantized, in older transformers, is a `PackedTensor`. An expert of another format is a
`CodedTensor`, and may stay in its codes (`quant.type: stored`)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.base.partitions.filling import SOURCE_DTYPES
from trainer.model.held.blockwise import NESTED_BLOCK, dequantize_absmax, dequantize_blocks
from trainer.model.held.codes import CodedTensor, KeptSources, KeptWeight
from trainer.store.safetensors_index import (
    DTYPE_BYTES,
    Joined,
    PackedSources,
    PackedTensor,
    StoredTensor,
    Stretch,
    numel,
)

Weight = StoredTensor | PackedTensor
_TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Unpacked:
    """The values of a 4-bit weight, as bitsandbytes dequantizes them to their original type."""

    packed: PackedTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.packed.shape

    @property
    def dtype(self) -> str:
        return _TYPES[self.packed.made_of]

    def read(self, begin: int, end: int) -> bytearray:
        packed, size = self.packed, self.packed.block_size
        first, last = begin // size, -(-end // size)
        start, stop = first * size, min(last * size, math.prod(self.shape))
        half = _bytes(packed.sources.parts["weight"], start // 2, -(-stop // 2))
        scales, dtype = self._scales(first, last), SOURCE_DTYPES[self.dtype]
        values = dequantize_blocks(half, scales, stop - start, packed.quant_type, size, dtype)
        return bytearray(values[begin - start : end - start].view(torch.uint8).numpy())

    def _scales(self, first: int, last: int) -> Tensor:
        """The absmax of the blocks [first, last), fp32."""
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
    """The stretches of `parts` as a stack of this shape, still in 4 bits. None if that is impossible.

    A stack is quantized matrix by matrix. Its blocks equal those of the parts if each stretch is a whole part and
    begins at a block of its matrix. The blocks of its 8-bit scales are equal only if each stretch is a whole matrix.
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
    joined = dict[str, StoredTensor]()
    for name in first.sources.parts:
        sources = [part.sources.parts[name] for part in placed]
        joined[name] = _joined(sources, [Stretch(index, 0, numel(source)) for index, source in enumerate(sources)])
    return replace(first, shape=shape, sources=PackedSources(joined, means or None))


def _joined(sources: Sequence[StoredTensor], stretches: Sequence[Stretch]) -> Joined:
    """Join stretches of bytes end to end."""
    return Joined(tuple(sources), tuple(stretches), (sum(stretch.numel for stretch in stretches),))


def kept_sources(weight: Weight) -> KeptSources | None:
    """Where the codes and the scales of a parameter are stored. None if it must be decoded while it is read.

    Stretches of rows can be joined if each consists of whole rows of tiles, so that the parameter's tiles are those of
    its parts.
    """
    if isinstance(weight, CodedTensor):
        return weight.kept
    if not isinstance(weight, Joined):
        return None
    parts = [part.kept if isinstance(part, CodedTensor) else None for part in weight.parts]
    given = [part for part in parts if part is not None]
    if len(given) < len(parts) or len({part.kept for part in given}) != 1 or given[0].kept.transposed:
        return None
    kept = given[0].kept
    if not all(_is_whole(kept, weight.parts[one.part].shape, one, weight.shape) for one in weight.stretches):
        return None
    columns, bits, scale = weight.shape[-1], kept.code.bits, DTYPE_BYTES[kept.scales]
    across = kept.code.tiles(1, columns)[1] * scale
    bytes_of = {
        "weight": [Stretch(one.part, one.begin * bits // 8, one.numel * bits // 8) for one in weight.stretches],
        "scales": [_tiles(one, columns, kept.code.tile[0], across) for one in weight.stretches],
        "seconds": [_tiles(one, columns, 1, 4) for one in weight.stretches],
        "zeros": [_tiles(one, columns, kept.code.tile[0], across // scale) for one in weight.stretches],
    }
    joined = dict[str, StoredTensor]()
    for name in given[0].sources.parts:
        joined[name] = _joined([part.sources.parts[name] for part in given], bytes_of[name])
    return KeptSources(kept, PackedSources(joined, None))


def _is_whole(kept: KeptWeight, part: Sequence[int], stretch: Stretch, shape: Sequence[int]) -> bool:
    """Whether a stretch is whole rows of tiles, in its part of shape `part` and in the parameter of this `shape`."""
    columns, down = shape[-1], kept.code.tile[0]
    if part[-1] != columns or stretch.begin % columns or stretch.numel % columns:
        return False
    if (stretch.begin, stretch.numel) == (0, math.prod(part)) and len(part) == 2 and part[0] == shape[-2]:
        return True
    return not any(size % down for size in (stretch.begin // columns, stretch.numel // columns, part[-2], shape[-2]))


def _tiles(stretch: Stretch, columns: int, down: int, across: int) -> Stretch:
    """The stretch of bytes for a stretch of rows, with `across` bytes for each row of tiles."""
    begin, rows = stretch.begin // columns // down, -(-stretch.numel // columns // down)
    return Stretch(stretch.part, begin * across, rows * across)
