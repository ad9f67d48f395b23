"""The bytes of the base on their way into partitions: read in pieces, many in flight, in bounded memory.

Work is cut into rounds of about the same size. At the end of each round all ranks agree that nobody failed, so a rank
that cannot read stops all of them with its own sentence, and rank 0 reports how far they are together.
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
from trainer.store.safetensors_index import StoredTensor, item_bytes

# The memory of a load beside its result: so many pieces of so many bytes, as read, and one while it is quantized.
PIECE_BYTES = 4 * 2**20
PIECES_IN_FLIGHT = 8
_ROUNDS = 100
# malloc.h of glibc
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _GLIBC_DEFAULT_LIMIT = -1, -3, 32 * 2**20


@dataclass(frozen=True)
class Piece:
    """Elements [begin, end) of `source`, and what to do with their bytes."""

    source: StoredTensor
    begin: int
    end: int
    place: Callable[[bytearray], None]

    def read(self) -> bytearray:
        return self.source.read(self.begin, self.end)


class Readable(Protocol):
    """A piece of any kind."""

    def read(self) -> bytearray: ...


AnyPiece = TypeVar("AnyPiece", bound=Readable)


class Job(Protocol):
    """The filling of one tensor."""

    @property
    def numel(self) -> int:
        """Elements of the whole tensor: the same on every rank, as rounds are cut by it."""
        ...

    def pieces(self) -> Iterator[Piece]:
        """The ranges that this rank has to read, in pieces of at most `PIECE_BYTES`."""
        ...

    def finish(self) -> None:
        """Called on every rank when all of them have placed their pieces; may be collective."""
        ...


def cut(source: StoredTensor, begin: int, end: int, multiple: int) -> Iterator[tuple[int, int]]:
    """[begin, end) of `source` in pieces of at most `PIECE_BYTES`, each a multiple of `multiple` elements long."""
    step = max(1, PIECE_BYTES // item_bytes(source) // multiple) * multiple
    for first in range(begin, end, step):
        yield first, min(end, first + step)


@contextmanager
def freed_memory_given_back() -> Iterator[None]:
    """Have glibc return what is freed at once if it is a mebibyte or more.

    By itself it raises this limit up to 32 MiB as buffers are freed, and keeps whatever is smaller for later: after a
    load that would be as much again as the shard.
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
def run_jobs(jobs: Sequence[Job], ranks: World, log: Callable[[str], None]) -> None:
    """Do them all. Collective.

    Raises:
        CapstanError: on every rank, when a read failed on one.
    """
    done, total = 0, 0
    for job in jobs:
        total += sum((piece.end - piece.begin) * item_bytes(piece.source) for piece in job.pieces())
    progress = _Progress(sum(row[0] for row in ranks.gather(float(total))), log if ranks.rank == 0 else None)
    pool = ThreadPoolExecutor(PIECES_IN_FLIGHT, thread_name_prefix="read")
    try:
        reads = read_ahead(pool, (piece for job in jobs for piece in job.pieces()))
        for part in _rounds(jobs):
            failure = None
            try:
                for job in part:
                    for _ in job.pieces():
                        piece, data = next(reads)
                        piece.place(data)
                        done += len(data)
            except Exception as error:
                failure = error
            progress.report(sum(row[0] for row in ranks.agree(failure, float(done))))
            for job in part:
                job.finish()
    finally:
        # A read that is being retried need not be waited for: nobody wants its bytes any more.
        pool.shutdown(wait=False, cancel_futures=True)


def read_ahead(pool: ThreadPoolExecutor, pieces: Iterable[AnyPiece]) -> Iterator[tuple[AnyPiece, bytearray]]:
    """Pieces with their bytes, in order; reads run ahead."""
    pending: deque[tuple[AnyPiece, Future[bytearray]]] = deque()
    for piece in pieces:
        pending.append((piece, pool.submit(piece.read)))
        if len(pending) >= PIECES_IN_FLIGHT:
            first, future = pending.popleft()
            yield first, future.result()
    while pending:
        first, future = pending.popleft()
        yield first, future.result()


def _rounds(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """The same rounds on every rank, of about a hundredth of all elements each."""
    limit = sum(job.numel for job in jobs) / _ROUNDS
    part: list[Job] = []
    for job in jobs:
        part.append(job)
        if sum(job.numel for job in part) >= limit:
            yield part
            part = []
    if part:
        yield part


class _Progress:
    """One line over all ranks every few seconds, and one at the end."""

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
