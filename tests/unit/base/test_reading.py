"""A load reads ahead in pieces and rounds of bounded size, tells its progress, and stops all ranks with one error."""

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import count
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.base.load import load
from trainer.base.load.load import Filling, Placement
from trainer.base.partitions import filling, reading
from trainer.base.partitions.reading import Piece, cut, freed_memory_given_back, read_ahead, run_jobs
from trainer.errors import Damaged
from trainer.state.zero.division import Division
from trainer.store.pace import BUDGET


class Source:
    """A stored tensor whose bytes are those of its places."""

    def __init__(self, size: int, dtype: str = "U8") -> None:
        self.shape, self.dtype = (size,), dtype

    def read(self, begin: int, end: int) -> bytearray:
        return bytearray(number % 256 for number in range(begin, end))


class Job:
    """A job that collects the bytes of its tensor, which has a piece for each ten."""

    def __init__(self, size: int) -> None:
        self.numel, self.source = size, Source(size)
        self.found, self.finished = bytearray(), 0

    def pieces(self) -> Iterator[Piece]:
        for begin in range(0, self.numel, 10):
            yield Piece(self.source, begin, min(self.numel, begin + 10), self.found.extend)

    def finish(self) -> None:
        assert len(self.found) == self.numel, "it is not read yet"
        self.finished += 1


class Alone:
    """The first of `world_size` ranks, of which the others have nothing to read."""

    rank = 0

    def __init__(self, world_size: int = 1) -> None:
        self.world_size, self.rounds = world_size, 0

    def gather(self, *values: float) -> list[list[float]]:
        return [list(values)] + [[0.0] * len(values)] * (self.world_size - 1)

    def agree(self, failure: Exception | None, *values: float) -> list[list[float]]:
        if failure is not None:
            raise failure
        self.rounds += 1
        return self.gather(*values)


def test_a_piece_has_four_mebibytes_at_most_and_whole_multiples() -> None:
    assert list(cut(Source(0, "BF16"), 5, 2**22 + 6, 1)) == [
        (5, 2**21 + 5),
        (2**21 + 5, 2**22 + 5),
        (2**22 + 5, 2**22 + 6),
    ]
    assert list(cut(Source(0), 0, 2**22 + 1, 1000)) == [(0, 4_194_000), (4_194_000, 2**22 + 1)]
    assert list(cut(Source(0), 0, 2**23, 2**23)) == [(0, 2**23)]  # one is larger by itself
    assert list(cut(Source(0), 3, 3, 1)) == []


def test_eight_reads_run_ahead_of_the_first_that_is_placed() -> None:
    asked = list[int]()

    class Read:
        def __init__(self, number: int) -> None:
            self.number = number

        def read(self) -> bytearray:
            return bytearray([self.number])

    def pieces() -> Iterator[Read]:
        for number in range(20):
            asked.append(number)
            yield Read(number)

    with ThreadPoolExecutor(8) as pool:
        for number, (piece, data) in enumerate(read_ahead(pool, pieces())):
            assert (piece.number, data) == (number, bytearray([number]))
            assert len(asked) == min(20, number + 8)


@pytest.mark.parametrize(
    ("sizes", "ranks", "rounds"),
    [
        ([1] * 10_100, 1, [101] * 100),  # a hundredth of all
        ([2**24] * 1000, 2, [2] * 500),  # or so many of each rank
        ([2**24] * 5, 1, [1] * 5),
        ([50, 1, 1, 1000], 100, [1, 3]),  # 10.52 elements
        ([1000, 1, 1], 100, [1, 2]),  # the rest is a round, too
        ([], 1, []),
    ],
)
def test_a_round_has_a_hundredth_of_all_elements_or_sixteen_mebi_of_each_rank(
    sizes: list[int], ranks: int, rounds: list[int]
) -> None:
    jobs: list[Any] = [SimpleNamespace(numel=size) for size in sizes]
    found = list(reading._rounds(jobs, ranks))
    assert [job for part in found for job in part] == jobs
    assert [len(part) for part in found] == rounds


def test_all_jobs_are_done_in_their_order_and_the_progress_is_told() -> None:
    jobs, said, ranks = [Job(size) for size in (25, 10, 3, 0, 62)], list[str](), Alone(4)
    pace: Any = SimpleNamespace(rate=0.0, rates=[])

    def set_rate(rate: float) -> None:
        pace.rate = rate
        pace.rates.append(rate)

    pace.set_rate = set_rate
    run_jobs(jobs, ranks, said.append, pace)  # type: ignore[arg-type]
    assert [job.found for job in jobs] == [job.source.read(0, job.numel) for job in jobs]
    assert [job.finished for job in jobs] == [1] * 5
    (line,) = said
    assert line.startswith("loading the base: 0.00 of 0.00 GB by all ranks, ")
    assert line.endswith("0 s left")
    # Equal rates at first, and then the mean.
    assert pace.rates[:2] == [BUDGET / 4, BUDGET / 16]
    assert len(pace.rates) == 1 + ranks.rounds


def test_a_rank_that_cannot_read_says_so_in_the_round_and_finishes_no_job_of_it() -> None:
    jobs = [Job(25), Job(10)]

    def fails(begin: int, end: int) -> bytearray:
        raise Damaged("it is gone.")

    jobs[1].source.read = fails  # type: ignore[method-assign]
    told = list[Exception | None]()

    class Telling(Alone):
        def agree(self, failure: Exception | None, *values: float) -> list[list[float]]:
            told.append(failure)
            return super().agree(failure, *values)

    with pytest.raises(Damaged, match="it is gone"):
        run_jobs(jobs, Telling(), lambda text: None)  # type: ignore[arg-type]
    assert [job.finished for job in jobs] == [1, 0]
    assert [type(failure) for failure in told] == [type(None), Damaged], "the other ranks do not wait for this one"


def test_nobody_waits_for_a_read_that_is_being_retried_once_another_has_failed() -> None:
    begun, may_go_on, ended = Event(), Event(), list[int]()
    failing, waiting = Job(10), Job(10)

    def fails(begin: int, end: int) -> bytearray:
        begun.wait(5)
        raise Damaged("it is gone.")

    def waits(begin: int, end: int) -> bytearray:
        begun.set()
        may_go_on.wait(5)
        ended.append(begin)
        return bytearray(end - begin)

    failing.source.read, waiting.source.read = fails, waits  # type: ignore[method-assign]
    with pytest.raises(Damaged, match="it is gone"):
        run_jobs([failing, waiting], Alone(), lambda text: None)  # type: ignore[arg-type]
    assert ended == []
    may_go_on.set()


def test_a_buffer_is_filled_from_its_first_element_to_its_last() -> None:
    values = torch.zeros(5, dtype=torch.uint8)
    ranks: Any = SimpleNamespace(division=Division(2, 1), apart=True)
    job = filling.copied_whole(Source(5), values, ranks)
    assert job.numel == 5
    for piece in job.pieces():
        piece.place(piece.read())
    assert values.tolist() == [0, 1, 2, 3, 4]


def test_progress_is_told_every_five_seconds_and_once_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    times, said = iter((100.0, 104.9, 105.0, 109.9, 110.0, 111.0, 120.0, 120.0, 120.0)), list[str]()
    monkeypatch.setattr(reading.time, "monotonic", lambda: next(times))
    progress = reading._Progress(8e9, said.append)
    for done in (1e9, 2e9, 3e9, 4e9, 8e9, 8e9):
        progress.report(done)
    assert said == [
        "loading the base: 2.00 of 8.00 GB by all ranks, 0.40 GB/s, 15 s left",
        "loading the base: 4.00 of 8.00 GB by all ranks, 0.40 GB/s, 10 s left",
        "loading the base: 8.00 of 8.00 GB by all ranks, 0.73 GB/s, 0 s left",
    ]
    reading._Progress(8e9, None).report(8e9)  # another rank than the first is silent


def test_glibc_gives_freed_memory_back_while_a_load_runs_and_has_its_default_after(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """malloc.h: M_TRIM_THRESHOLD is -1, M_MMAP_THRESHOLD is -3; the default's upper limit is 32 MiB."""
    given = list[tuple[int, int]]()
    libc = SimpleNamespace(mallopt=lambda *option: given.append(option))
    monkeypatch.setattr(reading.ctypes, "CDLL", lambda _name: libc)
    with freed_memory_given_back():
        assert dict(given) == {-3: 2**20, -1: 2**21}
    assert dict(given) == {-3: 2**25, -1: 2**26}


class Reader:
    """A source of shares that tells what it fills, and for whom."""

    room = None

    def __init__(self, name: str, told: list[Any]) -> None:
        self.name, self._told = name, told

    def fill(self, placement: Placement, world: Any, log: Any) -> int:
        self._told.append((self.name, placement.jobs(), world.world_size))
        return 7


@pytest.mark.parametrize(
    ("own", "apart", "cache", "expected"),
    [
        ("own", False, "", ("own", 4)),
        ("own", True, "", ("files", 1)),  # each rank by itself, though it was filled from memory
        ("memory", False, "", ("files", 4)),
        ("memory", False, "whole", ("cached", 4)),
        ("memory", False, "damaged", ("files", 4)),
    ],
)
def test_what_is_read_again_is_what_was_asked_for_and_comes_from_where_bytes_are(
    own: str, apart: bool, cache: str, expected: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    told, one, two = list[Any](), torch.zeros(2), torch.zeros(3)
    jobs: list[Any] = ["a", "b", "c"]
    placement = Placement({}, [Filling(lambda _: jobs[:1], [one]), Filling(lambda _: jobs[1:], [two])])
    partitioner: Any = SimpleNamespace(
        apart=apart, begin_reading=lambda: told.append("begins"), end_reading=lambda: told.append("ends")
    )

    def cached(*_: Any) -> Reader:
        if cache == "damaged":
            raise Damaged("it is gone.")
        return Reader("cached", told)

    monkeypatch.setattr(load, "Files", lambda _base: Reader("files", told))
    monkeypatch.setattr(load, "Cached", cached)
    monkeypatch.setattr(load._Load, "_cache_folder", lambda _: None)
    monkeypatch.setattr(load._Load, "_cache_in", lambda *_: None)
    anything: Any = None
    config: Any = SimpleNamespace(quant=SimpleNamespace(cache=bool(cache)))
    ranks: Any = SimpleNamespace(world_size=4, agreeing=nullcontext, device=None)
    loaded = load._Load(anything, config, {}, ranks, *[anything] * 5)
    source: Any = load.InMemory(anything, {}) if own == "memory" else Reader("own", told)
    loaded.refill(load._Filled(anything, placement, partitioner, source, 0), [two])
    name, world_size = expected
    assert told == ["begins", (name, ["b", "c"], world_size), "ends"]


def test_a_load_tells_the_bytes_that_it_has_read_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    base: Any = SimpleNamespace(store=SimpleNamespace(range_bytes=1000, pace="the base's"))
    cache: Any = SimpleNamespace(store=SimpleNamespace(range_bytes=200, pace="the cache's"), sources="packed")
    run, jobs = list[Any](), list[Any]()
    placement: Any = SimpleNamespace(jobs=lambda *stored: jobs.append(stored) or "jobs")

    def read(*given: Any) -> None:
        run.append(given)
        base.store.range_bytes += 7
        cache.store.range_bytes += 5

    monkeypatch.setattr(load, "run_jobs", read)
    world: Any = "world"
    assert load.Files(base).fill(placement, world, print) == 7
    assert load.Cached(base, cache).fill(placement, world, print) == 12
    assert run == [("jobs", world, print, pace) for pace in ("the base's", "the cache's")]
    assert jobs == [(), ("packed",)]


@pytest.mark.parametrize(
    ("size", "way"),
    [(2**20, "_Told"), (2**20 + 1, "_Neighbours"), (2**22 * 4 // 2, "_Neighbours"), (2**22 * 4 // 2 + 1, "Job")],
)
def test_a_tensor_is_told_by_one_rank_up_to_a_mebibyte_and_read_for_neighbours_while_two_parts_are_a_piece(
    size: int, way: str
) -> None:
    ranks: Any = SimpleNamespace(
        division=Division(4, 1), apart=False, across=None, turns=defaultdict[int, Iterator[int]](count), place=0
    )

    def make(_parts: Any) -> Any:
        return Job(size)

    assert type(filling.divided(Source(size), {}, make, ranks)).__name__ == way
    ranks.apart = True
    assert type(filling.divided(Source(size), {}, make, ranks)).__name__ == "Job"
    ranks.apart, ranks.division = False, Division(1, 1)
    assert type(filling.divided(Source(size), {}, make, ranks)).__name__ == "Job"
    assert filling.sharing_ranks(2**24 // 3, 4) == 2, "not three and one"
    assert [filling.sharing_ranks(2**20 + 1, readers) for readers in (1, 3, 64)] == [1, 3, 64], "all, and no more"
    ranks.division, ranks.across = Division(2, 2), object()
    assert type(filling.divided(Source(size), {}, make, ranks)).__name__ == "_SharedOut"
