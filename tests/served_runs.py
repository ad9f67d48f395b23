"""Runs whose servers start with them, and the processes that such a run has beside its ranks."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.dist import stub_server
from trainer.store.store import Store

PATIENCE = 600.0
ENDS_SECONDS = 30.0
SERVE = (
    *("objective.name=grpo", "rollout.reward=length", "rollout.max_tokens=3", "rollout.engine=serve"),
    *(f"rollout.serve.command=[{sys.executable}, {stub_server.__file__}]", "rollout.serve.options=[--engine]"),
    "cluster.gpus_per_worker=0",
)


def base_of(run: Store) -> str:
    """A name of the served base by which the servers of this run are known; the stub opens none."""
    return f"rollout.serve.base={run.uri}/served-base"


def sidecars(run: Store) -> dict[int, str]:
    """The processes of this run beside its ranks, with what is left of its servers: their commands by their numbers."""
    found = dict[int, str]()
    marks = (b"\0" + run.uri.encode() + b"\0", run.uri.encode() + b"/served-base")
    for number in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            command = Path(f"/proc/{number}/cmdline").read_bytes()
        except OSError:
            continue
        if any(mark in command for mark in marks):
            found[number] = command.replace(b"\0", b" ").decode()
    return found


def servers(run: Store) -> list[int]:
    """Those that answer, without the engines that they start."""
    return [number for number, command in sidecars(run).items() if stub_server.__file__ in command]


def until(holds: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.3)  # a look reads the command of each process of the machine
    return found
