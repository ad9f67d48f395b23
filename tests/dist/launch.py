"""Runs a function of a module as several ranks: real processes, each with an end.

Such functions stand beside the tests that use them, in a file for each topic. They are collective, and take and return
JSON; tensors go through files. The processes are forked from a server that has imported the training stack once, as
that import takes seconds.
"""

import faulthandler
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from tests.forked import server

TIMEOUT = 300.0  # below the limit of a test, so that the ranks' output is shown; a busy machine takes many times longer


class RankFailed(AssertionError):
    """A rank raised, died or did not end in time; the text holds the ends of its output."""


class Group:
    """Ranks that are running. `wait` ends when all have; leaving the group's context kills what is left."""

    def __init__(self, processes: list[BaseProcess], folder: Path, timeout: float) -> None:
        self._processes, self._folder = processes, folder
        self._deadline = time.monotonic() + timeout

    def wait(self) -> list[Any]:
        """The function's result on each rank; raises `RankFailed` as soon as one fails."""
        self.wait_until(lambda: all(process.exitcode == 0 for process in self._processes))
        return [json.loads((self._folder / f"{rank}.json").read_text()) for rank in range(len(self._processes))]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Return once `condition` holds; raises `RankFailed` when a rank fails first, or when time is up."""
        while not condition():
            for rank, process in enumerate(self._processes):
                if process.exitcode:
                    raise RankFailed(f"rank {rank} ended with exit code {process.exitcode}:\n{self._output(rank)}")
            if time.monotonic() > self._deadline:
                outputs = (f"rank {rank}:\n{self._output(rank)}" for rank in range(len(self._processes)))
                raise RankFailed("the ranks did not end in time\n" + "\n".join(outputs))
            connection.wait([process.sentinel for process in self._processes if process.exitcode is None], 0.02)

    def wait_for_ends(self) -> list[int | None]:
        """The ranks' exit codes, of ranks that may die: -9 is SIGKILL."""
        for process in self._processes:
            process.join(max(0.0, self._deadline - time.monotonic()))
        return [process.exitcode for process in self._processes]

    def kill(self) -> None:
        """SIGKILL to every rank, then wait for their ends."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _output(self, rank: int) -> str:
        log = self._folder / f"{rank}.log"
        return log.read_text(errors="replace")[-3000:] if log.exists() else "it has not begun"


@contextmanager
def running(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    ranks_per_node: int | None = None,
    timeout: float = TIMEOUT,
    extra_environment: dict[str, str] | None = None,
) -> Iterator[Group]:
    """`world_size` ranks that run `function(*arguments)`; the arguments and results are JSON.

    `function` is found again in each process by its module and name, so it is one of a module's own.
    """
    context = server()
    # The rendezvous listens here before any rank starts, on a port that the system chose.
    rendezvous = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
    per_node = ranks_per_node or world_size
    with tempfile.TemporaryDirectory(prefix="capstan-ranks-") as folder:
        processes = []
        for rank in range(world_size):
            environment = {
                **(extra_environment or {}),
                "RANK": rank,
                "WORLD_SIZE": world_size,
                "LOCAL_RANK": rank % per_node,
                "LOCAL_WORLD_SIZE": per_node,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": rendezvous.port,
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                # The server may be older than the S3 server, whose address and keys are these.
                **{name: value for name, value in os.environ.items() if name.startswith("AWS_")},
            }
            given = {name: str(value) for name, value in environment.items()}
            what = (function.__module__, function.__qualname__, json.dumps(arguments))
            process = context.Process(target=_run_rank, args=(*what, given, folder, int(timeout)), daemon=True)
            processes.append(process)
        group = Group(processes, Path(folder), timeout)
        try:
            for process in processes:
                process.start()
            yield group
        finally:
            group.kill()


def launch(world_size: int, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
    """Run to the end: the results of `function` in rank order."""
    with running(world_size, function, *arguments, **options) as group:
        return group.wait()


def _run_rank(
    module: str, function: str, arguments: str, environment: dict[str, str], folder: str, timeout: int
) -> None:
    """In the new process: output to a file, the function, its result to another."""
    signal.alarm(timeout + 5)  # an end even if whoever waits for us is gone
    rank = environment["RANK"]
    output = os.open(f"{folder}/{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    faulthandler.dump_traceback_later(max(1, timeout - 5))  # so that a rank that hangs says where
    os.environ.update(environment)
    import torch.distributed as dist

    result = getattr(import_module(module), function)(*json.loads(arguments))
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()
