"""The ranks of a run on this machine alone: processes beside the driver, without Ray, which would take longer to start
than many a small run.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.policy import retry
from launcher.start.attempts import Attempts, Watch, keep_trying
from launcher.start.local_group import check_servers_here, count_ranks, end_together, places
from trainer import errors
from trainer.config import Config
from trainer.config.cluster import STARTS_HERE
from trainer.errors import NOT_JSON, CapstanError, NonFiniteLoss
from trainer.processes import children
from trainer.processes.devices import visible_gpus
from trainer.store.scratch import scratch_folder

_WORDS = 300


def ranks_here(config: Config) -> int | None:
    """How many ranks a run that joins no cluster has on this machine. None where it asks for what Ray gives: resources
    by name, or more GPUs than this machine has, which Ray refuses with what is missing. Raises `ConfigError` where
    there is no room for its servers."""
    cluster = config.cluster
    if cluster.ray.address == STARTS_HERE or cluster.ray.resources:
        return None
    check_servers_here(config, cluster.fewest_workers or 1)
    ranks = count_ranks(config, config.rollout.serving_gpus)
    return ranks if ranks >= (cluster.fewest_workers or 1) else None


def run_here(attempts: Attempts, ranks: int, log: Callable[[str], None]) -> None:
    """Train as `ranks` processes beside this one until done or beyond the budgets. Raises what `keep_trying` does."""
    keep_trying(attempts, lambda: _attempt(attempts, ranks, log), log)


def _attempt(attempts: Attempts, ranks: int, log: Callable[[str], None]) -> retry.Failure | None:
    log(f"launch: starts the process{'es' if ranks > 1 else ''} of {ranks} rank{'s' if ranks > 1 else ''}")
    with scratch_folder("start") as folder:
        given = Path(folder, "task.json")
        given.write_text(json.dumps(attempts.task()), encoding="utf-8")
        with _started(given, ranks, attempts.config.rollout.serving_gpus) as group:
            # Those that were killed had waited for one that is gone, and have nothing to tell.
            killed = end_together([rank.process for rank in group], Watch(attempts).look)
            ended = {number: rank for number, rank in enumerate(group) if number not in killed}
        failures = {number: error for number, rank in ended.items() if (error := rank.error()) is not None}
        # Ranks that lose another fail after it, whatever their numbers are.
        first = min(failures, key=lambda number: ended[number].told_at(), default=None)
        # Errors of ours and ranks that are gone are causes also where another rank has failed before.
        always = CapstanError | retry.RankDied
        causes = {number: error for number, error in failures.items() if number == first or isinstance(error, always)}
        return retry.classify(causes) if causes else None


@dataclass(frozen=True)
class _Rank:
    """The process of a rank, with the files of how it ended and of what it has printed."""

    process: "subprocess.Popen[bytes]"
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
def _started(task: Path, ranks: int, serving: int) -> Iterator[Sequence[_Rank]]:
    """The ranks' processes, which have ended when the block has. They do not see the last GPUs, which are `serving`."""
    group = list[_Rank]()
    devices = {"CUDA_VISIBLE_DEVICES": ",".join(visible_gpus()[:-serving])} if serving else {}
    try:
        for number, place in enumerate(places(ranks)):
            outcome, said = (task.with_name(f"{name}-{number}") for name in ("outcome.json", "said"))
            with said.open("wb") as output:
                # Its output is in the rank's log. It has a session of its own, because the driver tells the ranks of a
                # Ctrl-C.
                process = children.start(
                    [sys.executable, "-m", "launcher.start.local_rank", str(task), str(outcome)],
                    env={**os.environ, **place, **devices},
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


def _error(found: dict[str, Any]) -> Exception:
    """The error that `launcher.start.local_rank` has told of."""
    if not found["ours"]:
        return type(found["kind"], (Exception,), {})(found["text"])
    kind: type[CapstanError] = getattr(errors, found["kind"])
    return kind(found["text"], found["window"]) if issubclass(kind, NonFiniteLoss) else kind(found["text"])
