"""Ranks as processes of this machine: how many, where each is among the others, and how they end together; and the
servers beside them.
"""

import shutil
import socket
import time
from collections.abc import Callable, Sequence
from subprocess import Popen
from typing import Any

from trainer.config import Config
from trainer.config.objective import SERVE
from trainer.errors import ConfigError
from trainer.processes.devices import local_gpus

_LOOPBACK = "127.0.0.1"
_LOOK_SECONDS = 0.1
_LAST_WORDS_SECONDS = 5.0


def count_ranks(config: Config, serving: int = 0) -> int:
    """A rank for each GPU of this machine but those that are `serving`, and no more than `cluster.workers`; without
    GPUs as many as that, or one.
    """
    most = config.cluster.most_workers
    gpus = 0 if config.cluster.gpus_per_worker == 0 else local_gpus() - serving
    return min(gpus, most or gpus) if gpus else most or 1


def check_servers_here(config: Config, ranks: int) -> None:
    """Raise `ConfigError` where the servers that start with the run find no program on this machine, or no GPUs beside
    those of so many `ranks`.
    """
    serve = config.rollout.serve
    if config.rollout.engine != SERVE:
        return
    if shutil.which(serve.command[0]) is None:
        raise ConfigError(
            f"rollout.serve.command: {serve.command[0]!r} is not found on {socket.gethostname()}. Install vLLM, or give"
            " the program by its path: [/opt/vllm/bin/vllm, serve]."
        )
    serving, there = config.rollout.serving_gpus, local_gpus()
    training = ranks if config.cluster.gpus_per_worker != 0 and there else 0
    if serving and serving + training > there:
        raise ConfigError(
            f"rollout.serve: {serve.replicas} x {serve.gpus} GPUs for servers and {training} for ranks are more than"
            f" the {there} of {socket.gethostname()}. Lower rollout.serve.replicas, rollout.serve.gpus (0 serves on"
            " CPUs) or cluster.workers."
        )


def gpus_of_server(number: int, each: int, gpus: Sequence[str]) -> str:
    """CUDA_VISIBLE_DEVICES of the server of this number, from 0, on a machine with these: the last of them, as ranks
    take the first.
    """
    end = len(gpus) - number * each
    return ",".join(gpus[end - each : end])


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
    """Return when all have ended. Where one fails, the others get a moment for their own words, and are then killed, as
    they would wait for
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
