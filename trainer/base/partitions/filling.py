"""Fills this rank's partitions with one tensor's bytes, which are copied, or quantized on the way.

ZeRO-3 gives rank r the elements [r * ceil(n / W), (r + 1) * ceil(n / W)) of a flat parameter. So each rank knows which
bytes of a tensor it needs before it reads any. To quantize, it reads the range that covers its share, extended to whole
blocks. The result equals bitsandbytes' for the whole tensor to the bit, because blocks are independent.

A matrix whose transpose is stored in the files is read once by all ranks together. A rank's share of it is some of its
rows. In the stored transpose these are scattered over the whole tensor, so every rank would read all of it. Instead
each rank reads its share of the transpose's rows, which lie together, and the ranks exchange what the others need.

A small tensor is read by one rank, which tells the others, because each request to a store takes its time, however few
bytes it is for.
"""

from collections.abc import Iterator
from math import ceil
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.base.partitions.reading import Job, Piece, cut
from trainer.errors import Damaged
from trainer.model.held.layers import HeldWeights
from trainer.processes.accelerator import onto
from trainer.state.zero.partition import Partition, Partitioner, share
from trainer.store.safetensors_index import PackedSources, StoredTensor, item_bytes, numel

# A tensor of so many bytes is read by one rank. A rank's share of it would be a request for little.
_TOLD_BYTES = 2**20
# Weights that are quantized at once. bitsandbytes needs about 20 bytes a weight while it quantizes on a CPU.
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
    """A job that copies a stored tensor, in the partition's dtype."""

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


def make_packed(module: HeldWeights, partitioner: Partitioner) -> dict[str, Partition]:
    """Make partitions of the sizes that `module` needs. They become its parameters."""
    made = {name: partitioner.make((size,), torch.uint8) for name, size in module.sizes.items()}
    for name, partition in made.items():
        setattr(module, name, partition.parameter)
    return made


def copy_packed(
    module: HeldWeights, made: dict[str, Partition], stored: PackedSources, ranks: Partitioner
) -> list[Job]:
    """The jobs that fill `made` with the packed weights in `stored`. Raises `Damaged` if these have other sizes."""
    there, means = {name: numel(source) for name, source in stored.parts.items()}, stored.mean or []
    if there != module.sizes or len(means) != module.slices * module.form.means:
        raise Damaged(f"packed weights of {there} bytes were found, where {module.sizes} belong.")
    if means:
        module.absmax_mean.copy_(torch.tensor(means))
    return [exchanged(Copy(part := stored.parts[name], made[name]), part, ranks) for name in made]


class Quantize:
    """A job that quantizes a weight into `module`, slice by slice, each in pieces of whole units of its format.

    Double quantization needs the mean of a slice's scales and blocks of 256 scales, which span ranks. So the scales are
    gathered once all ranks have computed theirs. They take 1/16 byte a weight, for one tensor at a time.
    """

    def __init__(
        self, source: StoredTensor, module: HeldWeights, made: dict[str, Partition], partitioner: Partitioner
    ) -> None:
        self._source, self._module, self._made, self._ranks = source, module, made, partitioner
        self._form, shape = module.form, module.slice_shape
        self._unit, self._bytes, self._unit_bytes = (
            self._form.unit(*shape),
            self._form.sizes(*shape),
            self._form.unit_bytes(*shape),
        )
        self._units = ceil(module.numel / self._unit)
        self.numel = numel(source)
        self._scales: Tensor | None = None  # this rank's part of a matrix's, from its first piece to its `finish`

    def pieces(self) -> Iterator[Piece]:
        for index in range(self._module.slices):
            first, last = self._span(index)
            start = index * self._module.numel
            stop = start + min(self._module.numel, last * self._unit)
            for begin, end in cut(self._source, start + first * self._unit, stop, self._unit):
                unit = (begin - start) // self._unit
                yield Piece(
                    self._source, begin, end, lambda data, index=index, unit=unit: self._place(index, unit, data)
                )

    def _span(self, index: int) -> tuple[int, int]:
        """The units of a slice whose bytes or scales this rank holds. The range is nearly the same for all of these."""
        used = list[tuple[int, int]]()
        for name, size in self._unit_bytes.items():
            part, whole = self._made[name], self._bytes[name]
            begin, end = _overlap(part.begin, part.end, index * whole, whole)
            if end > begin:
                used.append((begin // size, min(ceil(end / size), self._units)))
        if self._form.spanning:
            begin, end = _overlap(*self._scale_span(), index * self._units, self._units)
            if end > begin:
                used.append((begin, end))
        return (min(begin for begin, _ in used), max(end for _, end in used)) if used else (0, 0)

    def _scale_span(self) -> tuple[int, int]:
        """The range of scales that this rank computes, among those that are finished together."""
        return share(self._module.slices * self._units, self._ranks.size, self._ranks.rank)

    def _place(self, index: int, unit: int, data: bytearray) -> None:
        at_once = max(1, _QUANTIZED_AT_ONCE // self._unit) * self._unit
        for part in onto(as_tensor(data, self._source), self._ranks.device).split(at_once):
            encoded = self._form.encode(part.to(self._module.dtype), self._module.slice_shape[1])
            for name, size in self._unit_bytes.items():
                self._made[name].write(index * self._bytes[name] + unit * size, encoded[name])
            if spanning := self._form.spanning:
                scales = encoded[spanning.part].view(torch.float32)
                parameter, span = self._made[spanning.part].parameter, self._scale_span()
                Partition(parameter, *span, self._own_scales()).write(index * self._units + unit, scales)
            unit += len(part) // self._unit

    def _own_scales(self) -> Tensor:
        if self._scales is None:
            size = ceil(self._module.slices * self._units / self._ranks.size)
            self._scales = torch.zeros(size, device=self._ranks.device)
        return self._scales

    def finish(self) -> None:
        if (spanning := self._form.spanning) is None:
            return
        mine = self._own_scales()
        self._scales = None
        every = mine.new_empty(len(mine) * self._ranks.size)
        dist.all_gather_into_tensor(every, mine, group=self._ranks.group)
        for index in range(self._module.slices):
            parts, mean = spanning.finish(every[index * self._units : (index + 1) * self._units])
            for name, values in parts.items():
                self._made[name].write(index * self._bytes[name], values)
            self._module.absmax_mean[index] = mean


def _overlap(begin: int, end: int, start: int, size: int) -> tuple[int, int]:
    """The part of [begin, end) within the slice [start, start + size), counted from the slice's start."""
    return max(begin - start, 0), min(max(end - start, 0), size)


@runtime_checkable
class StoredTransposed(StoredTensor, Protocol):
    """A matrix (rows, columns) that is better read as its `transpose`.

    Read multiples of `together` of the transpose's rows, because these share scales and other facts beside them."""

    @property
    def transpose(self) -> StoredTensor: ...
    @property
    def together(self) -> int: ...


def exchanged(job: Job, source: StoredTensor, ranks: Partitioner) -> Job:
    """`job`, which fills a parameter's partitions from `source`. Ranks share the reading if that is worth it."""
    if ranks.size == 1:
        return job
    if isinstance(source, StoredTransposed):
        return _Exchanged(job, source, ranks)
    return _Told(job, source, ranks) if numel(source) * item_bytes(source) <= _TOLD_BYTES else job


class _Told:
    """A job with a tensor that one rank of the group reads, as its turn comes, and tells the others."""

    def __init__(self, job: Job, source: StoredTensor, ranks: Partitioner) -> None:
        self._job, self._source, self._ranks = job, source, ranks
        self.numel = job.numel
        self._reader = next(ranks.turns) % ranks.size
        self._read: bytearray | None = None

    def pieces(self) -> Iterator[Piece]:
        if self._ranks.rank == self._reader:
            yield Piece(self._source, 0, numel(self._source), self._place)

    def _place(self, data: bytearray) -> None:
        self._read = data

    def finish(self) -> None:
        """Tell the others, and do the job with what was read. Collective."""
        size, ranks = item_bytes(self._source), self._ranks
        data = self._read or bytearray(numel(self._source) * size)
        self._read = None
        told = onto(torch.frombuffer(data, dtype=torch.uint8), ranks.device)
        dist.broadcast(told, group=ranks.group, group_src=self._reader)
        values = told.cpu().numpy()
        for piece in self._job.pieces():
            piece.place(bytearray(values[piece.begin * size : piece.end * size]))
        self._job.finish()


class _Exchanged:
    """A job with shared reading. From its first piece to `finish` it holds this rank's share of the matrix twice."""

    def __init__(self, job: Job, source: StoredTransposed, ranks: Partitioner) -> None:
        self._job, self._source, self._ranks = job, source, ranks
        self.numel = job.numel
        self._read: Tensor | None = None

    def pieces(self) -> Iterator[Piece]:
        transpose, (outputs, _) = self._source.transpose, self._source.shape
        first, last = self._rows_of(self._ranks.rank)
        for begin, end in cut(transpose, first * outputs, last * outputs, multiple=self._source.together * outputs):
            yield Piece(transpose, begin, end, lambda data, at=begin - first * outputs: self._place(at, data))

    def _rows_of(self, rank: int) -> tuple[int, int]:
        """The rows [begin, end) of the transpose that a rank reads."""
        together, inputs = self._source.together, self._source.shape[1]
        first, last = share(-(-inputs // together), self._ranks.size, rank)
        return min(first * together, inputs), min(last * together, inputs)

    def _place(self, offset: int, data: bytearray) -> None:
        values = as_tensor(data, self._source)
        if self._read is None:
            first, last = self._rows_of(self._ranks.rank)
            self._read = values.new_empty((last - first) * self._source.shape[0])
        self._read[offset : offset + len(values)] = values

    def finish(self) -> None:
        """Exchange the values that ranks have read, and do the job with them."""
        wanted = list(self._job.pieces())
        columns = self._source.shape[1]
        begin = wanted[0].begin // columns if wanted else 0
        end = -(-wanted[-1].end // columns) if wanted else 0
        values = self._exchange(begin, end)
        for piece in wanted:
            there = values[piece.begin - begin * columns : piece.end - begin * columns]
            piece.place(bytearray(there.view(torch.uint8).numpy()))
        self._job.finish()

    def _exchange(self, begin: int, end: int) -> Tensor:
        """The rows [begin, end) of the matrix, flat, on the CPU. Collective."""
        ranks, (outputs, _) = self._ranks, self._source.shape
        span = onto(torch.tensor([begin, end]), ranks.device)
        spans = span.new_empty(2 * ranks.size)
        dist.all_gather_into_tensor(spans, span, group=ranks.group)
        read, self._read = self._read, None
        if read is None:  # if there are few rows, a rank may have none to read
            read = torch.empty(0, dtype=SOURCE_DTYPES[self._source.dtype])
        mine = read.view(-1, outputs)
        parts = [
            mine[:, first:last].contiguous().view(-1).view(torch.uint8) for first, last in spans.view(-1, 2).tolist()
        ]
        rows = [last - first for first, last in map(self._rows_of, range(ranks.size))]
        sizes = [count * (end - begin) * read.element_size() for count in rows]
        found = onto(torch.empty(sum(sizes), dtype=torch.uint8), ranks.device)
        dist.all_to_all_single(
            found, onto(torch.cat(parts), ranks.device), sizes, [len(part) for part in parts], group=ranks.group
        )
        return found.cpu().view(read.dtype).view(sum(rows), end - begin).t().flatten()
