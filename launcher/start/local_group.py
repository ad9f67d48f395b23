"""Ranks as processes of this machine: how many, where each is among the others, and how they end together."""

import socket
import time
from collections.abc import Callable, Sequence
from subprocess import Popen
from typing import Any

from trainer.config import Config
from trainer.processes.devices import local_gpus

_LOOPBACK = "127.0.0.1"
_LOOK_SECONDS = 0.1
_LAST_WORDS_SECONDS = 5.0


def count_ranks(config: Config) -> int:
    """A rank for each GPU of this machine, and no more than `cluster.workers`; without GPUs as many as that, or one."""
    most = config.cluster.most_workers
    gpus = 0 if config.cluster.gpus_per_worker == 0 else local_gpus()
    return min(gpus, most or gpus) if gpus else most or 1


def places(ranks: int) -> list[dict[str, str]]:
    """The variables that tell each rank where it is among the others, as torchrun has them; none for a single one."""
    if ranks == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": _LOOPBACK, "MASTER_PORT": port}
    return [
        {name: str(value) for name, value in {**world, "RANK": rank, "LOCAL_RANK": rank}.items()}
        for rank in range(ranks)
    ]


def end_together(processes: Sequence[Popen[Any]], look: Callable[[], None] = lambda: None) -> list[int]:
    """Return when all have ended. Where one fails, the others get a moment for their own words, and are then killed, as they would wait for
    it: these are returned, by their numbers. `look` is called meanwhile, and may raise."""
    deadline: float | None = None
    while alive := [number for number, process in enumerate(processes) if process.poll() is None]:
        time.sleep(_LOOK_SECONDS)
        look()
        if deadline is None and any(process.poll() for process in processes):
            deadline = time.monotonic() + _LAST_WORDS_SECONDS
        if deadline is not None and time.monotonic() > deadline:
            left = [number for number in alive if processes[number].poll() is None]
            for number in left:
                processes[number].kill()
                processes[number].wait()
            return left
    return []
