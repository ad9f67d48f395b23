"""Compiles data on all CPUs of a Ray cluster: batches of rows travel to its nodes as tasks, one CPU each.

The rows are read and the shards written here, in their order, so the result is the same as on one machine. If a node is
lost, Ray starts its tasks elsewhere. A node that joins gets its share from the next batch on.
"""

import gc
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from launcher.cluster.ray.cluster import joined_ray
from trainer.data.source.rows import Batch
from trainer.errors import CapstanError, ConfigError, DataError, first_line

_BATCHES_AHEAD = 3
_LOOK_SECONDS = 5.0
_WAIT_SECONDS = 1.0
_PATIENCE_SECONDS = 60.0
# A batch that ends its process this often, such as one that crashes the tokenizer, would do so forever.
_RETRIES = 5

T = TypeVar("T")
R = TypeVar("R")
Log = Callable[[str], None]


def map_on_cluster(
    log: Log,
    look: Callable[[], None],
    work: Iterable[tuple[Batch, T]],
    start: Callable[[], Callable[[Batch], R]],
) -> Iterator[tuple[R, T]]:
    """With its first two arguments given, this is a `trainer.data.compile.pool.Mapper` over the joined Ray cluster.

    `look` is called every second while a result is awaited. It may raise to end the work.

    Raises:
        DataError: the process that works on a batch dies again and again.
        ConfigError: Capstan cannot be imported on a node of the cluster.
    """
    import ray

    start()  # an error of it is raised here, and not in a task
    # The strategy is named because a trial of a sweep would otherwise keep its tasks to its own placement group, which
    # has no CPU.
    task: Any = ray.remote(num_cpus=1, max_retries=_RETRIES, scheduling_strategy="DEFAULT")(_work)
    handle = ray.put(start)
    waiting: deque[tuple[Any, str, T]] = deque()
    cpus, looked = _cpus(), time.monotonic()
    log(f"compiling on the {cpus} CPUs of the Ray cluster")
    try:
        for batch, beside in work:
            # The tokenizer is in a list, because Ray would otherwise fetch and unpack it again for each batch.
            waiting.append((task.remote([handle], batch), f"{batch.uri}: the rows from {batch.first} on", beside))
            if time.monotonic() - looked > _LOOK_SECONDS:
                cpus, looked = _cpus(), time.monotonic()
            while len(waiting) > _BATCHES_AHEAD * cpus:
                yield _next(waiting, log, look)
        while waiting:
            yield _next(waiting, log, look)
    finally:
        for reference, _, _ in waiting:
            ray.cancel(reference, force=True)


def join_and_map(
    address: str, log: Log, work: Iterable[tuple[Batch, T]], start: Callable[[], Callable[[Batch], R]]
) -> Iterator[tuple[R, T]]:
    """Run `map_on_cluster` on the cluster at `address`, joined only for this time."""
    with joined_ray(address):
        yield from map_on_cluster(log, lambda: None, work, start)


def _cpus() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 0)))


def _next(waiting: "deque[tuple[Any, str, T]]", log: Log, look: Callable[[], None]) -> tuple[Any, T]:
    """Return the result of the oldest waiting piece, and the value that it came with.

    Ray wraps each error into one of its own. This unwraps them into errors of the user, the machine or the file.
    """
    import ray
    from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

    reference, rows, beside = waiting[0]
    began = told = time.monotonic()
    while not ray.wait([reference], timeout=_WAIT_SECONDS, fetch_local=False)[0]:
        look()
        if time.monotonic() - told > _PATIENCE_SECONDS:
            told = time.monotonic()
            free = ray.available_resources().get("CPU", 0)
            why = "" if free >= 1 else f"; all {_cpus()} CPUs of the cluster are taken"
            log(f"{rows} are not compiled yet, after {told - began:.0f} s{why}")
    waiting.popleft()
    try:
        return ray.get(reference), beside
    except RayTaskError as error:
        if isinstance(error.cause, CapstanError):
            raise error.cause from error
        if isinstance(error.cause, ImportError) or "failed to import" in str(error):
            raise ConfigError(
                f"the Ray cluster: a machine cannot import Capstan or what it needs ({first_line(error.cause)})."
                " Install the same there as here, or give cluster.ray.runtime_env."
            ) from error
        raise
    except (WorkerCrashedError, OutOfMemoryError) as error:
        raise DataError(
            f"{rows} cannot be compiled on the cluster: their process died {_RETRIES + 1} times ({first_line(error)}). "
            "Look at the file there."
        ) from error
    except RayError as error:
        raise CapstanError(f"{rows} cannot be compiled on the cluster ({first_line(error)}).") from error


_worker: tuple[str, Callable[[Batch], Any]] | None = None


def _work(handle: list[Any], batch: Batch) -> Any:
    """Work on one batch, in a process of the cluster. The tokenizer stays in the process for the next ones."""
    global _worker
    import ray

    key = handle[0].hex()
    if _worker is None or _worker[0] != key:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a task has one CPU
        start: Any = ray.get(handle[0])
        _worker = key, start()
        gc.freeze()
    return _worker[1](batch)
