"""Work on batches of rows, in this process or over all cores of the machine; a `Mapper` may have others too."""

import gc
import multiprocessing
import os
import pickle
import signal
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
from trainer.store.scratch import scratch_folder

_BATCHES_AHEAD = 8
# Below this, starting other processes takes longer than the work.
BYTES_FOR_PROCESSES = 16 * 2**20

T = TypeVar("T")
R = TypeVar("R")


class Mapper(Protocol):
    """Gives every batch's result together with what came beside the batch. The order is that of the batches, whatever
    does the work.

    `start` makes, in each process, what the batches are given to; what it raises is raised here, and once.
    """

    def __call__(
        self, work: Iterable[tuple[Batch, T]], start: Callable[[], Callable[[Batch], R]]
    ) -> Iterator[tuple[R, T]]: ...


def mapper_for(size: int, many: Mapper | None = None) -> Mapper:
    """The mapper for sources of `size` bytes: this process if they are small, else `many` or a process a core."""
    return partial(map_batches, processes=1) if size < BYTES_FOR_PROCESSES else many or map_on_cores


def map_on_cores(work: Iterable[tuple[Batch, T]], start: Callable[[], Callable[[Batch], R]]) -> Iterator[tuple[R, T]]:
    """A `Mapper` over a process for each core of this machine."""
    return map_batches(work, start, len(os.sched_getaffinity(0)))


def map_batches(
    work: Iterable[tuple[Batch, T]], start: Callable[[], Callable[[Batch], R]], processes: int
) -> Iterator[tuple[R, T]]:
    """A `Mapper` over `processes` of this machine; 1 is this one."""
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
    # In a file, as what is handed to a process that starts goes through a pipe: with a tokenizer in it, which is larger
    # than a pipe holds, each process would be started only when the one before has finished its imports.
    with scratch_folder("start") as folder:
        file = Path(folder, "start.pickle")
        file.write_bytes(pickle.dumps(start))
        spawning = multiprocessing.get_context("spawn")
        with (
            children.spawned_apart(),
            ProcessPoolExecutor(processes, spawning, _start_worker, (str(file),)) as pool,
        ):
            yield pool


_worker: Callable[[Batch], Any] | None = None


def _start_worker(start: str) -> None:
    global _worker
    os.nice(10)  # ranks may train beside it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores are taken already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole terminal; what it means the parent decides
    end_with_parent()
    _worker = pickle.loads(Path(start).read_bytes())()
    gc.freeze()  # what was imported stays; without this a tenth of the time goes to looking through it for garbage


def _work(batch: Batch) -> Any:
    assert _worker is not None
    return _worker(batch)
