"""Fills this rank's partitions with one tensor's bytes, which are copied, or quantized on the way.

ZeRO-3 gives rank r the elements [r * ceil(n / W), (r + 1) * ceil(n / W)) of a flat parameter. So each rank knows which
bytes of a tensor it needs before it reads any. To quantize, it reads the range that covers its share, extended to whole
blocks. The result equals bitsandbytes' for the whole tensor to the bit, because blocks are independent.

A matrix whose transpose is stored in the files is read once by all ranks together. A rank's share of it is some of its
rows. In the stored transpose these are scattered over the whole tensor, so every rank would read all of it. Instead
each rank reads its share of the transpose's rows, which lie together, and the ranks exchange what the others need.

Each request to a store takes its time, however few bytes it is for. So all ranks read the base together, once, even if
several nodes hold a copy of it each (`sharding.scope: node`): each rank reads and quantizes a part of its partitions,
and the ranks that hold the same partitions then exchange the results. If a rank's part of a tensor is small, one of
several ranks with neighbouring parts reads them all, and gives the others theirs. A very small tensor is read by one
rank, which tells all others.
"""

from collections.abc import Callable, Iterator, Mapping
from math import ceil
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.base.partitions.reading import PIECE_BYTES, Job, Piece, cut
from trainer.errors import Damaged
from trainer.model.held.layers import HeldWeights
from trainer.processes.accelerator import onto
from trainer.state.zero.division import share
from trainer.state.zero.partition import Partition, Partitioner
from trainer.store.safetensors_index import PackedSources, StoredTensor, item_bytes, numel

# A tensor of so many bytes is read by one rank. A rank's part of it would be a request for little.
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


class DividedJob(Job, Protocol):
    """A job whose stored tensor all ranks read together."""

    def wanted(self, place: int) -> tuple[int, int]:
        """The elements [begin, end) that contain all pieces of the reader at this place. Empty if it has none."""
        ...


class Copy:
    """A job that copies a stored tensor, in the partition's dtype."""

    def __init__(self, source: StoredTensor, partition: Partition, partitioner: Partitioner) -> None:
        self._source, self._partition, self._division = source, partition, partitioner.division
        self.numel = numel(source)

    def wanted(self, place: int) -> tuple[int, int]:
        return self._division.read_at(place, self.numel)

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
    return [copied(stored.parts[name], made[name], ranks) for name in made]


def copied(source: StoredTensor, partition: Partition, ranks: Partitioner) -> Job:
    """The job that copies a stored tensor into a partition."""
    return divided(source, {"": partition}, lambda made: Copy(source, made[""], ranks), ranks)


def copied_whole(source: StoredTensor, values: Tensor, ranks: Partitioner) -> Job:
    """The job that copies a stored tensor into `values` (its elements), which every rank has."""
    whole = Partition(nn.Parameter(values, requires_grad=False), 0, len(values), values)
    job = Copy(source, whole, ranks)
    return job if ranks.apart or ranks.division.readers == 1 else _Told(job, source, ranks)


def quantized(source: StoredTensor, module: HeldWeights, made: dict[str, Partition], partitioner: Partitioner) -> Job:
    """The job that quantizes a weight into `module`, whose partitions are `made`."""
    return divided(source, made, lambda parts: Quantize(source, module, parts, partitioner), partitioner)


class Quantize:
    """A job that quantizes a weight into `module`, slice by slice, each in pieces of whole units of its format.

    Double quantization needs the mean of a slice's scales and blocks of 256 scales, which span ranks. So the scales are
    gathered once all ranks have computed theirs. They take 1/16 byte a weight, for one tensor at a time.
    """

    def __init__(
        self, source: StoredTensor, module: HeldWeights, made: Mapping[str, Partition], partitioner: Partitioner
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

    def wanted(self, place: int) -> tuple[int, int]:
        spans = list(self._spans(place))
        return (self._elements(*spans[0])[0], self._elements(*spans[-1])[1]) if spans else (0, 0)

    def pieces(self) -> Iterator[Piece]:
        for index, first, last in self._spans(self._ranks.place):
            begin, end = self._elements(index, first, last)
            for start, stop in cut(self._source, begin, end, self._unit):
                unit = first + (start - begin) // self._unit
                yield Piece(
                    self._source, start, stop, lambda data, index=index, unit=unit: self._place(index, unit, data)
                )

    def _elements(self, index: int, first: int, last: int) -> tuple[int, int]:
        """The elements of the units [first, last) of a slice."""
        start = index * self._module.numel
        return start + first * self._unit, start + min(self._module.numel, last * self._unit)

    def _spans(self, place: int) -> Iterator[tuple[int, int, int]]:
        """Yield (slice, first unit, last unit) for all units whose bytes or scales the reader at this place makes.

        The range is nearly the same for bytes and all kinds of scales.
        """
        division, sizes = self._ranks.division, self._module.sizes
        made = [
            (*division.read_at(place, sizes[name]), self._bytes[name], size) for name, size in self._unit_bytes.items()
        ]
        if self._form.spanning:
            made.append((*self._scale_span(place), self._units, 1))
        made = [(begin, end, whole, size) for begin, end, whole, size in made if begin < end]
        if not made:
            return
        slices = min(begin // whole for begin, _, whole, _ in made), max(-(-end // whole) for _, end, whole, _ in made)
        for index in range(*slices):
            used = list[tuple[int, int]]()
            for begin, end, whole, size in made:
                first, last = _overlap(begin, end, index * whole, whole)
                if first < last:
                    used.append((first // size, min(ceil(last / size), self._units)))
            if used:
                yield index, min(first for first, _ in used), max(last for _, last in used)

    def _scale_span(self, place: int) -> tuple[int, int]:
        """The range of scales that the reader at this place computes, among those that are finished together."""
        return share(self._module.slices * self._units, self._ranks.division.readers, place)

    def _place(self, index: int, unit: int, data: bytearray) -> None:
        at_once = max(1, _QUANTIZED_AT_ONCE // self._unit) * self._unit
        for part in onto(as_tensor(data, self._source), self._ranks.device).split(at_once):
            encoded = self._form.encode(part.to(self._module.dtype), self._module.slice_shape[1])
            for name, size in self._unit_bytes.items():
                self._made[name].write(index * self._bytes[name] + unit * size, encoded[name])
            if spanning := self._form.spanning:
                scales = encoded[spanning.part].view(torch.float32)
                parameter, span = self._made[spanning.part].parameter, self._scale_span(self._ranks.place)
                Partition(parameter, *span, self._own_scales()).write(index * self._units + unit, scales)
            unit += len(part) // self._unit

    def _own_scales(self) -> Tensor:
        if self._scales is None:
            size = ceil(self._module.slices * self._units / self._ranks.division.readers)
            self._scales = torch.zeros(size, device=self._ranks.device)
        return self._scales

    def finish(self) -> None:
        if (spanning := self._form.spanning) is None:
            return
        mine = self._own_scales()
        self._scales = None
        division = self._ranks.division
        every = mine.new_empty(len(mine) * division.readers)
        dist.all_gather_into_tensor(every, mine)
        # From the ranks' order to that of their places.
        every = every.view(division.copies, division.holders, len(mine)).transpose(0, 1).flatten()
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


def divided(
    source: StoredTensor,
    made: Mapping[str, Partition],
    job: Callable[[Mapping[str, Partition]], DividedJob],
    ranks: Partitioner,
) -> Job:
    """A job that fills the partitions `made` from `source`, which all ranks read together, or this one apart.

    `job` makes the job of one rank by itself, from what it has to fill.
    """
    division, size = ranks.division, numel(source) * item_bytes(source)
    if ranks.apart or division.readers == 1:
        return job(made)
    own = job({name: ranks.read_part(partition) for name, partition in made.items()})
    if isinstance(source, StoredTransposed):
        shared: Job = _Exchanged(own, source, ranks)
    elif size <= _TOLD_BYTES:
        shared = _Told(own, source, ranks)
    elif (sharing := sharing_ranks(size, division.readers)) > 1:
        shared = _Neighbours(own, source, sharing, ranks)
    else:
        shared = own
    return shared if ranks.across is None else _SharedOut(shared, list(made.values()), ranks)


def sharing_ranks(size: int, readers: int) -> int:
    """The number of neighbouring ranks for which one reads their parts of `size` bytes, all by one request."""
    sharing = PIECE_BYTES * readers // size
    return ceil(readers / ceil(readers / sharing)) if sharing > 1 else 1


class _Told:
    """A job with a tensor that one rank reads, as its turn comes, and tells all others."""

    def __init__(self, job: Job, source: StoredTensor, ranks: Partitioner) -> None:
        self._job, self._source, self._ranks = job, source, ranks
        self.numel = job.numel
        self._reader = next(ranks.turns[ranks.division.readers]) % ranks.division.readers
        self._read: bytearray | None = None

    def pieces(self) -> Iterator[Piece]:
        if self._ranks.place == self._reader:
            yield Piece(self._source, 0, numel(self._source), self._place)

    def _place(self, data: bytearray) -> None:
        self._read = data

    def finish(self) -> None:
        """Tell the others, and do the job with what was read. Collective."""
        size, ranks = item_bytes(self._source), self._ranks
        data = self._read or bytearray(numel(self._source) * size)
        self._read = None
        told = onto(torch.frombuffer(data, dtype=torch.uint8), ranks.device)
        dist.broadcast(told, ranks.division.rank(self._reader))
        _do(self._job, told, 0, size)


class _Neighbours:
    """A job with a tensor of which one of `sharing` neighbours reads the parts of them all, as its turn comes."""

    def __init__(self, job: DividedJob, source: StoredTensor, sharing: int, ranks: Partitioner) -> None:
        self._job, self._source, self._ranks = job, source, ranks
        self.numel = job.numel
        self._sharing, self._turn = sharing, next(ranks.turns[sharing])
        self._read: bytearray | None = None

    @property
    def _neighbours(self) -> range:
        """The places of the ranks that share their reading, this rank among them. One of them reads for all."""
        first = self._ranks.place // self._sharing * self._sharing
        return range(first, min(first + self._sharing, self._ranks.division.readers))

    @property
    def _reader(self) -> int:
        return self._neighbours[self._turn % len(self._neighbours)]

    @property
    def _all_wanted(self) -> tuple[int, int]:
        """The elements that the neighbours want together."""
        wanted = [(begin, end) for begin, end in map(self._job.wanted, self._neighbours) if begin < end]
        return (min(begin for begin, _ in wanted), max(end for _, end in wanted)) if wanted else (0, 0)

    def pieces(self) -> Iterator[Piece]:
        begin, end = self._all_wanted if self._ranks.place == self._reader else (0, 0)
        if begin < end:
            yield Piece(self._source, begin, end, self._place)

    def _place(self, data: bytearray) -> None:
        self._read = data

    def finish(self) -> None:
        """Give the neighbours what they want, and do the job with what came. Collective."""
        ranks, item = self._ranks, item_bytes(self._source)
        division = ranks.division
        begin, end = self._job.wanted(ranks.place)
        come, gone = [0] * division.readers, [0] * division.readers
        come[division.rank(self._reader)] = (end - begin) * item
        given, read = list[Tensor](), self._read
        self._read = None
        if read is not None:
            start, values = self._all_wanted[0], torch.frombuffer(read, dtype=torch.uint8)
            for place in sorted(self._neighbours, key=division.rank):
                first, last = self._job.wanted(place)
                given.append(values[(first - start) * item : (last - start) * item] if first < last else values[:0])
                gone[division.rank(place)] = len(given[-1])
        sent = onto(torch.cat(given) if given else torch.empty(0, dtype=torch.uint8), ranks.device)
        found = sent.new_empty(sum(come))
        dist.all_to_all_single(found, sent, come, gone)
        _do(self._job, found, begin, item)


def _do(job: Job, data: Tensor, begin: int, size: int) -> None:
    """Do a job with `data`, the bytes of the elements from `begin` on, of `size` bytes each."""
    values = data.cpu().numpy()
    for piece in job.pieces():
        piece.place(bytearray(values[(piece.begin - begin) * size : (piece.end - begin) * size]))
    job.finish()


class _SharedOut:
    """A job with partitions that ranks of several nodes hold. Each makes a part of them, and gives it to the others."""

    def __init__(self, job: Job, partitions: list[Partition], ranks: Partitioner) -> None:
        self._job, self._partitions, self._ranks = job, partitions, ranks
        self.numel = job.numel

    def pieces(self) -> Iterator[Piece]:
        return self._job.pieces()

    def finish(self) -> None:
        """Collective."""
        self._job.finish()
        for partition in self._partitions:
            self._ranks.share_out(partition)


class _Exchanged:
    """A job with shared reading. From its first piece to `finish` it holds this rank's share of the matrix twice."""

    def __init__(self, job: Job, source: StoredTransposed, ranks: Partitioner) -> None:
        self._job, self._source, self._ranks = job, source, ranks
        self.numel = job.numel
        self._read: Tensor | None = None

    def pieces(self) -> Iterator[Piece]:
        transpose, (outputs, _) = self._source.transpose, self._source.shape
        first, last = self._rows_of(dist.get_rank())
        for begin, end in cut(transpose, first * outputs, last * outputs, multiple=self._source.together * outputs):
            yield Piece(transpose, begin, end, lambda data, at=begin - first * outputs: self._place(at, data))

    def _rows_of(self, rank: int) -> tuple[int, int]:
        """The rows [begin, end) of the transpose that a rank reads."""
        together, inputs = self._source.together, self._source.shape[1]
        first, last = share(-(-inputs // together), self._ranks.division.readers, rank)
        return min(first * together, inputs), min(last * together, inputs)

    def _place(self, offset: int, data: bytearray) -> None:
        values = as_tensor(data, self._source)
        if self._read is None:
            first, last = self._rows_of(dist.get_rank())
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
        spans = span.new_empty(2 * ranks.division.readers)
        dist.all_gather_into_tensor(spans, span)
        read, self._read = self._read, None
        if read is None:  # if there are few rows, a rank may have none to read
            read = torch.empty(0, dtype=SOURCE_DTYPES[self._source.dtype])
        mine = read.view(-1, outputs)
        parts = [
            mine[:, first:last].contiguous().view(-1).view(torch.uint8) for first, last in spans.view(-1, 2).tolist()
        ]
        rows = [last - first for first, last in map(self._rows_of, range(ranks.division.readers))]
        sizes = [count * (end - begin) * read.element_size() for count in rows]
        found = onto(torch.empty(sum(sizes), dtype=torch.uint8), ranks.device)
        dist.all_to_all_single(found, onto(torch.cat(parts), ranks.device), sizes, [len(part) for part in parts])
        return found.cpu().view(read.dtype).view(sum(rows), end - begin).t().flatten()
