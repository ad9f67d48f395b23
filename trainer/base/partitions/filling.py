"""How one tensor's bytes become this rank's partitions: copied, or quantized on the way.

ZeRO-3 gives rank r the elements [r * ceil(n / W), (r + 1) * ceil(n / W)) of a flat parameter, so the bytes this rank
needs of each tensor are known before any is read. To quantize, it reads the range that covers its share, rounded out to
whole blocks. Bit-identical to bitsandbytes quantizing the whole tensor, as blocks are independent.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.base.partitions.reading import Piece, cut
from trainer.errors import Damaged
from trainer.model.held.blockwise import quantize_absmax
from trainer.model.nf4 import Format, Layout, Packed, share
from trainer.processes.accelerator import onto
from trainer.state.zero.partition import Partition, Partitioner
from trainer.store.safetensors_index import PackedSources, StoredTensor, numel

# Weights; a multiple of every block size. bitsandbytes needs some 20 bytes a weight while it quantizes on a CPU.
_QUANTIZED_AT_ONCE = 2**19
SOURCE_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def as_tensor(data: bytearray, source: StoredTensor) -> Tensor:
    return torch.frombuffer(data, dtype=SOURCE_DTYPES[source.dtype])


class Copy:
    """A tensor that is kept as it is stored, in the partition's dtype."""

    def __init__(self, source: StoredTensor, partition: Partition) -> None:
        self._source, self._partition = source, partition
        self.numel = numel(source)

    def pieces(self) -> Iterator[Piece]:
        for begin, end in cut(self._source, self._partition.begin, self._partition.end, multiple=1):
            yield Piece(self._source, begin, end, lambda data, at=begin: self._place(at, data))

    def _place(self, offset: int, data: bytearray) -> None:
        self._partition.write(offset, onto(as_tensor(data, self._source), self._partition.local.device))

    def finish(self) -> None:
        pass


def make_packed(module: Packed, partitioner: Partitioner) -> dict[str, Partition]:
    """Partitions of the sizes that `module` needs, which become its parameters."""
    made = {name: partitioner.make((size,), torch.uint8) for name, size in module.sizes.items()}
    for name, partition in made.items():
        setattr(module, name, partition.parameter)
    return made


def copy_packed(module: Packed, made: dict[str, Partition], stored: PackedSources) -> list[Copy]:
    """The jobs that fill `made` with the packed weights in `stored`; raises `Damaged` where these have other sizes."""
    there, means = {name: numel(source) for name, source in stored.parts.items()}, stored.mean or []
    if there != module.sizes or len(means) != module.layout.slices * module.format.double:
        raise Damaged(f"packed weights of {there} bytes were found, where {module.sizes} belong.")
    if means:
        module.absmax_mean.copy_(torch.tensor(means))
    return [Copy(stored.parts[name], partition) for name, partition in made.items()]


class Quantize:
    """A weight that is quantized into `module`: slice by slice, each in pieces of whole blocks.

    Under double quantization the scales of a slice need their mean and their blocks of 256, which span ranks: they are
    gathered when all ranks have computed theirs. They are 1/16 byte a weight, for one tensor at a time.
    """

    def __init__(
        self, source: StoredTensor, module: Packed, made: dict[str, Partition], partitioner: Partitioner
    ) -> None:
        self._source, self._module, self._ranks = source, module, partitioner
        self._format: Format = module.format
        self._layout: Layout = module.layout
        self.numel = numel(source)
        self._weight, self._absmax, self._nested = made["weight"], made["absmax"], made.get("nested_absmax")
        self._scales: Tensor | None = None  # this rank's part of a matrix's, from its first piece to its `finish`

    def pieces(self) -> Iterator[Piece]:
        layout = self._layout
        for index in range(layout.slices):
            first, last = self._blocks(index)
            start = index * layout.numel
            stop = start + min(layout.numel, last * layout.block_size)
            for begin, end in cut(self._source, start + first * layout.block_size, stop, layout.block_size):
                block = (begin - start) // layout.block_size
                yield Piece(
                    self._source, begin, end, lambda data, index=index, block=block: self._place(index, block, data)
                )

    def _blocks(self, index: int) -> tuple[int, int]:
        """The blocks of a slice whose packed bytes or scales this rank holds: nearly the same range for both."""
        layout = self._layout
        in_byte = layout.weights_a_byte
        byte_begin, byte_end = _overlap(
            self._weight.begin, self._weight.end, index * layout.slice_bytes, layout.slice_bytes
        )
        scale_begin, scale_end = self._scale_span()
        scale_begin, scale_end = _overlap(scale_begin, scale_end, index * layout.slice_blocks, layout.slice_blocks)
        spans = [
            (
                in_byte * byte_begin // layout.block_size,
                -(-in_byte * byte_end // layout.block_size),
                byte_end > byte_begin,
            ),
            (scale_begin, scale_end, scale_end > scale_begin),
        ]
        used = [(begin, min(end, layout.slice_blocks)) for begin, end, holds in spans if holds]
        return (min(begin for begin, _ in used), max(end for _, end in used)) if used else (0, 0)

    def _scale_span(self) -> tuple[int, int]:
        """The blocks whose absmax this rank computes: a partition of the fp32 scales' bytes, or of the scales."""
        if self._format.double:
            return share(self._layout.blocks, self._ranks.size, self._ranks.rank)
        return self._absmax.begin // 4, -(-self._absmax.end // 4)

    def _place(self, index: int, block: int, data: bytearray) -> None:
        layout = self._layout
        for part in onto(as_tensor(data, self._source), self._ranks.device).split(_QUANTIZED_AT_ONCE):
            weights = part.to(self._format.dtype)
            packed, absmax = self._format.quantize(weights)
            self._weight.write(index * layout.slice_bytes + block * layout.block_size // layout.weights_a_byte, packed)
            first = index * layout.slice_blocks + block
            if self._format.double:
                begin, end = self._scale_span()
                Partition(self._absmax.parameter, begin, end, self._own_scales()).write(first, absmax)
            else:
                self._absmax.write(4 * first, absmax.view(torch.uint8))
            block += len(part) // layout.block_size

    def _own_scales(self) -> Tensor:
        if self._scales is None:
            self._scales = torch.zeros(-(-self._layout.blocks // self._ranks.size), device=self._ranks.device)
        return self._scales

    def finish(self) -> None:
        if self._nested is None:
            return
        layout, size = self._layout, self._ranks.size
        mine = self._own_scales()
        self._scales = None
        every = mine.new_empty(len(mine) * size)
        dist.all_gather_into_tensor(every, mine, group=self._ranks.group)
        for index in range(layout.slices):
            absmax = every[index * layout.slice_blocks : (index + 1) * layout.slice_blocks]
            codes, nested, mean = quantize_absmax(absmax)
            self._absmax.write(index * layout.slice_blocks, codes)
            self._nested.write(4 * index * layout.slice_nested_blocks, nested.view(torch.uint8))
            self._module.absmax_mean[index] = mean


def _overlap(begin: int, end: int, start: int, size: int) -> tuple[int, int]:
    """[begin, end) within the slice [start, start + size), counted from its start."""
    return max(begin - start, 0), min(max(end - start, 0), size)
