"""Reads a matrix whose transpose is stored in the files, once by all ranks together.

A rank's share of a matrix is some of its rows. In the stored transpose these are scattered over the whole tensor, so
every rank would read all of it. Instead each rank reads its share of the transpose's rows, which lie together, and the
ranks exchange what the others need.
"""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.base.partitions.filling import SOURCE_DTYPES, as_tensor
from trainer.base.partitions.reading import Job, Piece, cut
from trainer.processes.accelerator import onto
from trainer.state.zero.partition import Partitioner, share
from trainer.store.safetensors_index import StoredTensor


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
    return _Exchanged(job, source, ranks) if isinstance(source, StoredTransposed) and ranks.size > 1 else job


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
