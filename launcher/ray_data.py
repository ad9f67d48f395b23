"""Compiling on all CPUs of a Ray cluster: batches of rows travel to its machines as tasks, a CPU each.

The rows are read and the shards written here, in their order, so the result is the same as on one machine. A machine that
is lost takes its tasks along, and Ray starts them elsewhere; one that joins gets its share from the next batch on.
"""

import gc
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from launcher.ray_cluster import joined_ray
from trainer.data.rows import Batch
from trainer.errors import CapstanError, DataError

_BATCHES_AHEAD = 3
_LOOK_SECONDS = 5.0
# A batch that ends its process so often would do it for ever: a tokenizer that crashes on it, or a row that fills the memory.
_RETRIES = 5

T = TypeVar("T")
R = TypeVar("R")


Log = Callable[[str], None]


def map_on_cluster(
    log: Log, work: Iterable[tuple[Batch, T]], start: Callable[[], Callable[[Batch], R]]
) -> Iterator[tuple[R, T]]:
    """With its `log` given, a `trainer.data.pool.Mapper` over the Ray cluster that this process has joined.

    Raises:
        DataError: the process that works on a batch dies again and again.
    """
    import ray

    start()  # what it raises belongs here
    task: Any = ray.remote(num_cpus=1, max_retries=_RETRIES)(_work)
    handle = ray.put(start)
    waiting: deque[tuple[Any, Batch, T]] = deque()
    cpus, looked = _cpus(), time.monotonic()
    log(f"compiling on the {cpus} CPUs of the Ray cluster")
    try:
        for batch, beside in work:
            # In a list, as Ray would fetch and unpack the tokenizer anew for each batch.
            waiting.append((task.remote([handle], batch), batch, beside))
            if time.monotonic() - looked > _LOOK_SECONDS:
                cpus, looked = _cpus(), time.monotonic()
            while len(waiting) > _BATCHES_AHEAD * cpus:
                yield _next(waiting)
        while waiting:
            yield _next(waiting)
    finally:
        for reference, _, _ in waiting:
            ray.cancel(reference, force=True)


def join_and_map(
    address: str, log: Log, work: Iterable[tuple[Batch, T]], start: Callable[[], Callable[[Batch], R]]
) -> Iterator[tuple[R, T]]:
    """`map_on_cluster`, on the cluster at `address`, joined for just so long."""
    with joined_ray(address):
        yield from map_on_cluster(log, work, start)


def _cpus() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 0)))


def _next(waiting: "deque[tuple[Any, Batch, T]]") -> tuple[Any, T]:
    import ray
    from ray.exceptions import RayError, RayTaskError

    reference, batch, beside = waiting.popleft()
    try:
        return ray.get(reference), beside
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, CapstanError) else error from error
    except RayError as error:
        raise DataError(
            f"{batch.uri}: the rows from {batch.first} on cannot be compiled on the cluster: their process died "
            f"{_RETRIES + 1} times ({str(error).strip().splitlines()[0]}). Look at the file there."
        ) from error


_worker: tuple[str, Callable[[Batch], Any]] | None = None


def _work(handle: list[Any], batch: Batch) -> Any:
    """One batch, in a process of the cluster; the tokenizer stays in it for the next ones."""
    global _worker
    import ray

    key = handle[0].hex()
    if _worker is None or _worker[0] != key:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one CPU
        start: Any = ray.get(handle[0])
        _worker = key, start()
        gc.freeze()
    return _worker[1](batch)
