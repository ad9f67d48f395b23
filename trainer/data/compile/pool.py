"""Runs work on batches of rows in this process or on all cores of the machine. A `Mapper` may use other machines."""

import gc
import multiprocessing
import os
import pickle
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from trainer.data.source.rows import Batch
from trainer.errors import DoesNotFit
from trainer.processes import children
from trainer.processes.children import end_with_parent
from trainer.processes.deferred import makes_tokens_alone, transformers_without_torch
from trainer.store.scratch import scratch_folder

_BATCHES_AHEAD = 8
# For fewer bytes, starting other processes takes longer than the work.
BYTES_FOR_PROCESSES = 16 * 2**20

T = TypeVar("T")
R = TypeVar("R")


class Mapper(Protocol):
    """Yields the result of every batch with the value that came beside the batch, in the order of the batches.

    `start` makes, in each process, the function that handles the batches. If it raises, the mapper raises that error
    once.
    """

    def __call__(
        self, work: Iterable[tuple[Batch, T]], start: Callable[[], Callable[[Batch], R]]
    ) -> Iterator[tuple[R, T]]: ...


def mapper_for(size: int, many: Mapper | None = None) -> Mapper:
    """The mapper for sources of `size` bytes: this process if they are small, else `many` or one process a core."""
    return partial(map_batches, processes=1) if size < BYTES_FOR_PROCESSES else many or map_on_cores


def map_on_cores(work: Iterable[tuple[Batch, T]], start: Callable[[], Callable[[Batch], R]]) -> Iterator[tuple[R, T]]:
    """A `Mapper` with one process for each core of this machine."""
    return map_batches(work, start, len(os.sched_getaffinity(0)))


def map_batches(
    work: Iterable[tuple[Batch, T]], start: Callable[[], Callable[[Batch], R]], processes: int
) -> Iterator[tuple[R, T]]:
    """A `Mapper` with so many `processes` on this machine. With 1 it works in this process."""
    here = start()
    if processes == 1:
        yield from ((here(batch), beside) for batch, beside in work)
        return
    with _worker_pool(start, processes) as pool:
        waiting: deque[tuple[Future[R], T]] = deque()
        try:
            for batch, beside in work:
                waiting.append((pool.submit(_work, batch), beside))
                if len(waiting) > _BATCHES_AHEAD * processes:
                    result, beside = waiting.popleft()
                    yield result.result(), beside
            for result, beside in waiting:
                yield result.result(), beside
        except BrokenProcessPool as error:
            raise DoesNotFit(
                "a process that reads the data was killed, as happens when the machine's memory runs out. Free some and"
                " start again: what is compiled stays."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _worker_pool(start: Callable[[], Callable[[Batch], Any]], processes: int) -> Iterator[ProcessPoolExecutor]:
    # Pass `start` in a file. A new process gets its arguments through a pipe, and a tokenizer is larger than the pipe's
    # buffer: each process would then start only after the one before has finished its imports.
    with scratch_folder("start") as folder:
        file = Path(folder, "start.pickle")
        file.write_bytes(pickle.dumps(start))
        spawning = multiprocessing.get_context("spawn")
        with (
            children.spawned_apart(),
            ProcessPoolExecutor(processes, spawning, _start_worker, (str(file), "torch" in sys.modules)) as pool,
        ):
            yield pool


_worker: Callable[[Batch], Any] | None = None


def _start_worker(start: str, with_torch: bool) -> None:
    global _worker
    if not with_torch:  # as in the process that has started this one
        makes_tokens_alone()
        transformers_without_torch()
    os.nice(10)  # ranks may be training on the same machine
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; the parent decides what it means
    end_with_parent()
    _worker = pickle.loads(Path(start).read_bytes())()
    gc.freeze()  # imported modules stay; without this, garbage collection of them takes a tenth of the time


def _work(batch: Batch) -> Any:
    assert _worker is not None
    return _worker(batch)
