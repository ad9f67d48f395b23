"""Ranks that read a base together have, each, its share of what one rank makes of the whole tensor."""

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.base.partitions import filling, reading
from trainer.base.partitions.filling import copied, copied_whole, make_packed, quantized
from trainer.base.partitions.reading import Job
from trainer.model.held.formats.blocks import Blocks
from trainer.model.held.layers import HeldStack
from trainer.state.zero.division import Division, share
from trainer.state.zero.partition import Partition, Partitioner

# The ranks that hold a copy of the base, and the copies that there are.
LAYOUTS = [(4, 1), (3, 1), (2, 2), (3, 2), (1, 3)]
# The bytes of a tensor that one rank reads for all, and those of a piece.
WAYS = {"told": (2**20, 2**20), "by-neighbours": (0, 2**12), "each-its-own": (0, 300)}


class Ranks:
    """Threads that are ranks, and the collectives between them."""

    def __init__(self, holders: int, copies: int) -> None:
        self.division, self._here = Division(holders, copies), threading.local()
        every = tuple(range(holders * copies))
        groups = [every, *(tuple(range(first, len(every), holders)) for first in range(holders))]
        self._given = {group: dict[int, Any]() for group in groups}
        self._meetings = {group: threading.Barrier(len(group), timeout=60) for group in groups}
        self._every, self.exchanged = every, Counter[int]()

    def run(self, work: Callable[["Rank"], Any]) -> list[Any]:
        """Return what each rank's `work` returns."""

        def begin(rank: int) -> Any:
            self._here.rank = rank
            try:
                return work(Rank(rank, self.division))
            except BaseException:
                for meeting in self._meetings.values():
                    meeting.abort()
                raise

        with ThreadPoolExecutor(len(self._every)) as pool:
            return list(pool.map(begin, self._every))

    def _exchanged(self, mine: Any, group: Sequence[int] | None = None) -> list[Any]:
        key = self._every if group is None else tuple(group)
        self._given[key][self._here.rank] = mine
        self._meetings[key].wait()
        found = [self._given[key][rank] for rank in key]
        self._meetings[key].wait()
        return found

    def get_rank(self) -> int:
        return self._here.rank

    def broadcast(self, values: Tensor, source: int) -> None:
        values.copy_(self._exchanged(values.clone())[source])

    def all_gather_into_tensor(self, every: Tensor, mine: Tensor, group: Any = None) -> None:
        every.copy_(torch.cat(self._exchanged(mine.clone(), group)))

    def all_to_all_single(self, found: Tensor, given: Tensor, come: list[int], gone: list[int]) -> None:
        parts = [every[self._here.rank] for every in self._exchanged(given.clone().split(gone))]
        assert [len(part) for part in parts] == come
        found.copy_(torch.cat(parts))
        self.exchanged[self._here.rank] += len(found)


class Rank(Partitioner):
    """A rank's partitions, without DeepSpeed."""

    def __init__(self, rank: int, division: Division) -> None:
        self.device, self.apart, self.division = torch.device("cpu"), False, division
        self.size, self.rank, self.place = division.holders, rank % division.holders, division.place(rank)
        self.across: Any = tuple(range(self.rank, division.readers, self.size)) if division.copies > 1 else None
        self.turns = defaultdict[int, Iterator[int]](count)

    def make(self, shape: tuple[int, ...], dtype: torch.dtype) -> Partition:
        parameter: Any = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        begin, end = share(parameter.numel(), self.size, self.rank)
        return Partition(parameter, begin, end, torch.zeros(end - begin, dtype=dtype))


class Source:
    """A tensor in a file, and how many of its elements each rank has read by how many requests."""

    dtype = "F32"

    def __init__(self, values: Tensor) -> None:
        self.shape, self._values = tuple(values.shape), values.flatten()
        self.requests = Counter[int]()
        self.elements = 0

    def read(self, begin: int, end: int) -> bytearray:
        self.requests[dist.get_rank()] += 1
        self.elements += end - begin
        return bytearray(self._values[begin:end].numpy().tobytes())


class Turned(Source):
    """A matrix whose transpose a file has."""

    together = 8

    def __init__(self, values: Tensor) -> None:
        super().__init__(values)
        self.transpose = Transpose(values.T.contiguous())


class Transpose(Source):
    """Eight rows share their scales."""

    def read(self, begin: int, end: int) -> bytearray:
        assert begin % (8 * self.shape[1]) == 0
        return super().read(begin, end)


def do(job: Job) -> None:
    for piece in job.pieces():
        piece.place(piece.read())
    job.finish()


@pytest.fixture(params=LAYOUTS, ids=lambda layout: f"{layout[0]}-ranks-{layout[1]}-copies")
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    made = Ranks(*request.param)
    for name in ("get_rank", "broadcast", "all_gather_into_tensor", "all_to_all_single"):
        monkeypatch.setattr(dist, name, getattr(made, name))
    return made


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    told, piece = WAYS[request.param]
    monkeypatch.setattr(filling, "_TOLD_BYTES", told)
    monkeypatch.setattr(filling, "_QUANTIZED_AT_ONCE", 130)
    for module in (filling, reading):
        monkeypatch.setattr(module, "PIECE_BYTES", piece)
    return request.param


def values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("kind", [Source, Turned])
@pytest.mark.parametrize("shape", [(37, 21), (2, 3)], ids=["many-rows", "few-rows"])
def test_a_partition_has_its_elements_of_the_tensor(ranks: Ranks, way: str, kind: Any, shape: tuple[int, int]) -> None:
    whole = values(*shape)
    source = kind(whole)

    def work(rank: Rank) -> Partition:
        partition = rank.make(shape, torch.bfloat16)
        do(copied(source, partition, rank))
        return partition

    for made in ranks.run(work):
        assert torch.equal(made.local, whole.flatten()[made.begin : made.end].bfloat16())
    read = source.elements + (source.transpose.elements if kind is Turned else 0)
    assert read == whole.numel(), "all of it is read once by all together"
    if kind is Turned:  # rows come whole, so two ranks may get the row between them
        assert sum(ranks.exchanged.values()) <= 4 * (whole.numel() + shape[1] * (len(ranks.exchanged) - 1))


def test_every_rank_has_the_whole_of_a_buffer(ranks: Ranks, way: str) -> None:
    whole, numbers = values(5), torch.tensor([True, False, True])
    flags = Source(numbers)
    flags.dtype = "BOOL"

    def work(rank: Rank) -> tuple[Tensor, Tensor]:
        found, kept = torch.zeros(5), torch.zeros(3, dtype=torch.bool)
        do(copied_whole(Source(whole), found, rank))
        do(copied_whole(flags, kept, rank))
        return found, kept

    for found, kept in ranks.run(work):
        assert torch.equal(found, whole)
        assert torch.equal(kept, numbers)
    assert flags.requests.total() == 1


def test_ranks_take_turns_as_readers(ranks: Ranks, way: str) -> None:
    readers = ranks.division.readers
    sources = [Source(values(100)) for _ in range(readers)]

    def work(rank: Rank) -> None:
        for source in sources:
            do(copied(source, rank.make((100,), torch.float32), rank))

    ranks.run(work)
    if way != "each-its-own":
        requests = sum((source.requests for source in sources), Counter[int]())
        assert set(requests) == set(range(readers))
        assert len(set(requests.values())) == 1


@pytest.mark.parametrize(("kind", "slices"), [(Source, 1), (Source, 3), (Turned, 1)])
@pytest.mark.parametrize("double", [False, True], ids=["scales", "scales-of-scales"])
def test_a_partition_has_its_bytes_of_the_quantized_tensor(
    ranks: Ranks, way: str, kind: Any, double: bool, slices: int
) -> None:
    """A slice ends with a short block, and a rank's share ends within a slice."""
    shape, form = (10, 45), Blocks("nf4", 64, double)
    matrices = values(slices, *shape)
    source = kind(matrices[0] if slices == 1 else matrices)
    expected, means = defaultdict[str, list[Tensor]](list), list[float]()
    for matrix in matrices:
        parts = form.encode(matrix.bfloat16().flatten(), 45)
        if form.spanning:
            more, mean = form.spanning.finish(parts["absmax"].view(torch.float32))
            parts, means = parts | more, [*means, float(mean)]
        for name, part in parts.items():
            expected[name].append(part)

    def work(rank: Rank) -> tuple[HeldStack, dict[str, Partition]]:
        module = HeldStack((slices, *shape), form, torch.bfloat16)
        made = make_packed(module, rank)
        do(quantized(source, module, made, rank))
        return module, made

    for module, made in ranks.run(work):
        assert made.keys() == expected.keys()
        for name, partition in made.items():
            assert torch.equal(partition.local, torch.cat(expected[name])[partition.begin : partition.end])
        if double:
            assert module.absmax_mean.tolist() == means


def test_a_rank_without_elements_of_a_parameter_has_none_to_share_out() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    Rank(1, Division(2, 2)).share_out(Partition(parameter, 1, 1, torch.zeros(0)))
