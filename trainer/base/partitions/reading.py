"""Reads the bytes of the base into partitions, in pieces, with many reads in flight and in bounded memory.

The work is divided into rounds of about the same size. At the end of each round all ranks agree that none has failed.
So a rank that cannot read stops all of them with its own message, and rank 0 reports their common progress.
"""

import ctypes
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from trainer.processes.ranks import World
from trainer.store.pace import BUDGET, Pace
from trainer.store.safetensors_index import StoredTensor, item_bytes

# The memory of a load beside its result: this many pieces of this many bytes, and one more that is being quantized.
PIECE_BYTES = 4 * 2**20
PIECES_IN_FLIGHT = 8
_ROUNDS = 100
# The elements of a round for each rank. A rank keeps what it reads for others until the round's end.
_ROUND_ELEMENTS = 16 * 2**20
# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _GLIBC_DEFAULT_LIMIT = -1, -3, 32 * 2**20


@dataclass(frozen=True)
class Piece:
    """Elements [begin, end) of `source`, and the function that gets their bytes."""

    source: StoredTensor
    begin: int
    end: int
    place: Callable[[bytearray], None]

    def read(self) -> bytearray:
        return self.source.read(self.begin, self.end)


class Readable(Protocol):
    """The interface of a piece of any kind."""

    def read(self) -> bytearray: ...


AnyPiece = TypeVar("AnyPiece", bound=Readable)


class Job(Protocol):
    """The filling of one tensor."""

    @property
    def numel(self) -> int:
        """The elements of the whole tensor. They are the same on every rank, because rounds are divided by them."""
        ...

    def pieces(self) -> Iterator[Piece]:
        """Yield the ranges that this rank has to read, in pieces of at most `PIECE_BYTES`."""
        ...

    def finish(self) -> None:
        """Called on every rank once all ranks have placed their pieces. May be collective."""
        ...


def cut(source: StoredTensor, begin: int, end: int, multiple: int) -> Iterator[tuple[int, int]]:
    """Divide [begin, end) of `source` into pieces of at most `PIECE_BYTES`, each a multiple of `multiple` elements."""
    step = max(1, PIECE_BYTES // item_bytes(source) // multiple) * multiple
    for first in range(begin, end, step):
        yield first, min(end, first + step)


@contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """A context in which glibc returns freed memory of a mebibyte or more to the system at once.

    By default glibc raises this limit up to 32 MiB as buffers are freed, and keeps smaller ones for later. After a load
    that would be as much memory again as the shard.
    """
    _set_limit(2**20)
    try:
        yield
    finally:
        _set_limit(_GLIBC_DEFAULT_LIMIT)


def _set_limit(freed_bytes: int) -> None:
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, freed_bytes)
    libc.mallopt(_M_TRIM_THRESHOLD, 2 * freed_bytes)


@freed_memory_given_back()
def run_jobs(jobs: Sequence[Job], ranks: World, log: Callable[[str], None], pace: Pace | None = None) -> None:
    """Run all jobs. Collective.

    The ranks share a budget of requests: they begin with equal rates of `pace`, and agree on the mean in each round.

    Raises:
        CapstanError: on every rank, when a read failed on one.
    """
    done, total = 0, 0
    for job in jobs:
        total += sum((piece.end - piece.begin) * item_bytes(piece.source) for piece in job.pieces())
    progress = _Progress(sum(row[0] for row in ranks.gather(float(total))), log if ranks.rank == 0 else None)
    if pace is not None:
        pace.set_rate(BUDGET / ranks.world_size)
    pool = ThreadPoolExecutor(PIECES_IN_FLIGHT, thread_name_prefix="read")
    try:
        reads = read_ahead(pool, (piece for job in jobs for piece in job.pieces()))
        for part in _rounds(jobs, ranks.world_size):
            failure = None
            try:
                for job in part:
                    for _ in job.pieces():
                        piece, data = next(reads)
                        piece.place(data)
                        done += len(data)
            except Exception as error:
                failure = error
            rows = ranks.agree(failure, float(done), pace.rate if pace else 0.0)
            progress.report(sum(row[0] for row in rows))
            if pace is not None:
                pace.set_rate(sum(row[1] for row in rows) / len(rows))
            for job in part:
                job.finish()
    finally:
        # Do not wait for a read that is being retried. Nobody needs its bytes any more.
        pool.shutdown(wait=False, cancel_futures=True)


def read_ahead(pool: ThreadPoolExecutor, pieces: Iterable[AnyPiece]) -> Iterator[tuple[AnyPiece, bytearray]]:
    """Yield pieces with their bytes, in order. Reads run ahead."""
    pending: deque[tuple[AnyPiece, Future[bytearray]]] = deque()
    for piece in pieces:
        pending.append((piece, pool.submit(piece.read)))
        if len(pending) >= PIECES_IN_FLIGHT:
            first, future = pending.popleft()
            yield first, future.result()
    while pending:
        first, future = pending.popleft()
        yield first, future.result()


def _rounds(jobs: Sequence[Job], ranks: int) -> Iterator[list[Job]]:
    """Divide the jobs into rounds, each with at most about a hundredth of all elements. All ranks have the same."""
    limit = min(sum(job.numel for job in jobs) / _ROUNDS, ranks * _ROUND_ELEMENTS)
    part: list[Job] = []
    for job in jobs:
        part.append(job)
        if sum(job.numel for job in part) >= limit:
            yield part
            part = []
    if part:
        yield part


class _Progress:
    """Logs one line for all ranks every few seconds, and one at the end."""

    _SECONDS = 5.0

    def __init__(self, total: float, log: Callable[[str], None] | None) -> None:
        self._total, self._log = total, log
        self._started = self._last = time.monotonic()

    def report(self, done: float) -> None:
        now = time.monotonic()
        if self._log is None or not (now - self._last >= self._SECONDS or done >= self._total):
            return
        self._last = now
        rate = done / max(now - self._started, 1e-9)
        left = (self._total - done) / max(rate, 1e-9)
        log, self._log = self._log, None if done >= self._total else self._log
        log(
            f"loading the base: {done / 1e9:.2f} of {self._total / 1e9:.2f} GB by all ranks, {rate / 1e9:.2f} GB/s, "
            f"{left:.0f} s left"
        )
