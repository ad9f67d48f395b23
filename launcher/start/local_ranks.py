"""The ranks of a run on this machine alone: processes beside the driver, without Ray, which would take longer to start than many a small run."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from launcher.policy import retry
from launcher.start.attempts import Attempts, Watch, keep_trying
from trainer import errors
from trainer.config import Config, dump_config
from trainer.data.compile.prepare import Datasets
from trainer.errors import NOT_JSON, CapstanError, NonFiniteLoss
from trainer.files.scratch import scratch_folder
from trainer.processes import children
from trainer.processes.devices import local_gpus
from trainer.run.owner import Ownership

Process: TypeAlias = "subprocess.Popen[bytes]"

_HERE = "127.0.0.1"
_LOOK_SECONDS = 0.5
_LAST_WORDS_SECONDS = 5.0
"""Once a rank has failed, the others get so long to say why: theirs may be the cause."""
_WORDS = 300


def ranks_here(config: Config) -> int | None:
    """How many ranks a run that joins no cluster has on this machine. None where it asks for what Ray gives: resources by name, or more
    GPUs than this machine has, which Ray refuses with what is missing."""
    cluster = config.cluster
    if cluster.ray.starts_here or cluster.ray.resources:
        return None
    gpus = 0 if cluster.gpus_per_worker == 0 else local_gpus()
    whole = max(1, gpus)
    fewest, most = cluster.fewest_workers or whole, cluster.most_workers or whole
    if not gpus:
        return most
    return min(most, gpus) if fewest <= gpus else None


def run_here(
    config: Config, datasets: Datasets, owner: Ownership, *, ranks: int, resume: bool, log: Callable[[str], None]
) -> None:
    """Train as `ranks` processes beside this one until done or beyond the budgets.

    Raises:
        CapstanError: the run's own, or a crash's with its reason.
    """
    attempts = Attempts(config, datasets, owner, resume)

    def attempt() -> retry.Failure | None:
        log(f"launch: starts the process{'es' if ranks > 1 else ''} of {ranks} rank{'s' if ranks > 1 else ''}")
        return _attempt(attempts, ranks)

    keep_trying(attempts, attempt, log)


def _attempt(attempts: Attempts, ranks: int) -> retry.Failure | None:
    task = {
        "config": dump_config(attempts.config),
        "datasets": asdict(attempts.datasets),
        "resume": attempts.resume,
        "began": attempts.began,
    }
    with scratch_folder("start") as folder:
        given = Path(folder, "task.json")
        given.write_text(json.dumps(task), encoding="utf-8")
        with _started(given, ranks) as group:
            _wait([rank.process for rank in group], Watch(attempts))
            # Those that still run wait for one that is gone, and have nothing to tell.
            ended = {number: rank for number, rank in enumerate(group) if rank.process.returncode is not None}
        failures = {number: error for number, rank in ended.items() if (error := rank.error()) is not None}
        # Ranks that lose another fail after it, whatever their numbers are.
        first = min(failures, key=lambda number: ended[number].told_at(), default=None)
        causes = {number: error for number, error in failures.items() if number == first or _may_be_late(error)}
        return retry.classify(causes) if causes else None


def _may_be_late(error: Exception) -> bool:
    """Whether this error is the cause even where that of another rank came before."""
    return isinstance(error, CapstanError | retry.RankDied)


@dataclass(frozen=True)
class _Rank:
    """The process of a rank, with the files of how it ended and of what it has printed."""

    process: Process
    outcome: Path
    said: Path

    def told_at(self) -> float:
        """When it wrote down how it ended; infinite where it could not."""
        return self.outcome.stat().st_mtime if self.outcome.exists() else float("inf")

    def error(self) -> Exception | None:
        """Why the rank has ended, by what it wrote down; None when it is done."""
        code = self.process.returncode
        try:
            found = json.loads(self.outcome.read_text(encoding="utf-8"))
        except (OSError, *NOT_JSON):
            lines = self.said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            how = (
                f"its process was killed by signal {-code}" if code < 0 else f"its process ended with exit code {code}"
            )
            last = f" ({lines[-1][:_WORDS]})" if lines and code > 0 else ""
            return retry.RankDied(f"{how}{last}")
        return _error(found) if found else None


@contextmanager
def _started(task: Path, ranks: int) -> Iterator[Sequence[_Rank]]:
    """The ranks' processes, which have ended when the block has."""
    port = _free_port()
    group = list[_Rank]()
    try:
        for number in range(ranks):
            outcome, said = (task.with_name(f"{name}-{number}") for name in ("outcome.json", "said"))
            with said.open("wb") as output:
                # Its output is in the rank's log. It has a session of its own, because the driver tells the ranks of a Ctrl-C.
                process = children.start(
                    [sys.executable, "-m", "launcher.start.local_rank", str(task), str(outcome)],
                    env={**os.environ, **_place(number, ranks, port)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=output,
                    start_new_session=True,
                )
            group.append(_Rank(process, outcome, said))
        yield group
    finally:
        for rank in group:
            rank.process.kill()
        for rank in group:
            rank.process.wait()


def _place(number: int, ranks: int, port: int) -> dict[str, str]:
    """A rank's place among the others, in the variables that torchrun has for it."""
    return {
        "RANK": str(number),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(number),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": _HERE,
        "MASTER_PORT": str(port),
    }


def _free_port() -> int:
    with socket.create_server((_HERE, 0)) as probe:
        return probe.getsockname()[1]


def _wait(processes: Sequence[Process], watch: Watch) -> None:
    """Return when all ranks have ended, or one of them badly and the others had their time. Raises `Stopped` when they need not go on."""
    failed: float | None = None
    while running := [process for process in processes if process.poll() is None]:
        if failed is None and any(process.returncode for process in processes):
            failed = time.monotonic()
        if failed is not None and time.monotonic() - failed > _LAST_WORDS_SECONDS:
            return
        try:
            running[0].wait(_LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            watch.look()


def _error(found: dict[str, Any]) -> Exception:
    """The error that `launcher.start.local_rank` has told of."""
    if not found["ours"]:
        return type(found["kind"], (Exception,), {})(found["text"])
    kind: type[CapstanError] = getattr(errors, found["kind"])
    return kind(found["text"], found["window"]) if issubclass(kind, NonFiniteLoss) else kind(found["text"])
