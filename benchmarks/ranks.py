"""Ranks on this machine for a benchmark, and the place where they find each other."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import connection
from typing import Any


def become_rank(rank: int, world: int, port: int) -> None:
    """Have this process be a rank on one core, before it imports torch."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
    )  # fmt: skip


@contextmanager
def rendezvous() -> Iterator[int]:
    """A port where the ranks find each other."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    yield store.port


def run_ranks(main: Callable[..., None], world: int, *arguments: Any, seconds: float) -> None:
    """Call `main` with rank, world, port and `arguments` in a process for each rank. They end when one of them does, or
    are ended.
    """
    context = multiprocessing.get_context("spawn")
    with rendezvous() as port:
        given = (world, port, *arguments)
        processes = [context.Process(target=main, args=(rank, *given), daemon=True) for rank in range(world)]
        for process in processes:
            process.start()
        connection.wait([process.sentinel for process in processes], seconds)  # one that fails ends all
        for process in processes:
            process.join(60)
            process.kill()
