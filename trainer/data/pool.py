"""Work on batches of rows, in this process or over all cores of the machine."""

import gc
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import connection
from typing import Any, TypeVar

from trainer.data.rows import Batch

_BATCHES_AHEAD = 4
# Below this, starting other processes takes longer than the work.
_BYTES_FOR_PROCESSES = 16 * 2**20

T = TypeVar("T")
R = TypeVar("R")


def processes_for(size: int) -> int:
    """How many processes work on sources of `size` bytes: one for each core, and 1 (this one) for small sources."""
    return len(os.sched_getaffinity(0)) if size >= _BYTES_FOR_PROCESSES else 1


def map_batches(
    work: Iterable[tuple[Batch, T]], start: Callable[[], Callable[[Batch], R]], processes: int
) -> Iterator[tuple[R, T]]:
    """Every batch's result, with what came beside it, in order whatever the number of `processes`; 1 is this one.

    `start` makes, in each process, what the batches are given to; what it raises is raised here, and once.
    """
    here = start()
    if processes == 1:
        yield from ((here(batch), beside) for batch, beside in work)
        return
    spawning = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawning, _start_worker, (start,)) as pool:
        waiting: deque[tuple[Future[R], T]] = deque()
        try:
            for batch, beside in work:
                waiting.append((pool.submit(_work, batch), beside))
                if len(waiting) > _BATCHES_AHEAD * processes:
                    result, beside = waiting.popleft()
                    yield result.result(), beside
            for result, beside in waiting:
                yield result.result(), beside
        finally:
            pool.shutdown(cancel_futures=True)


_worker: Callable[[Batch], Any] | None = None


def _start_worker(start: Callable[[], Callable[[Batch], Any]]) -> None:
    global _worker
    os.nice(10)  # ranks may train beside it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken already
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = start()
    gc.freeze()  # what was imported stays; without this a tenth of the time goes to looking through it for garbage


def _end_with_parent() -> None:
    """A pool's worker would wait for ever for a parent that was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _work(batch: Batch) -> Any:
    assert _worker is not None
    return _worker(batch)
