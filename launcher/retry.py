"""What happens after a worker group dies: pure policy over what its ranks died of.

A rank's own `CapstanError` tells a mistake or a request apart from a crash: configuration, data, memory and non-finite
loss would only fail again, a stop is meant; a crash and a failing store are worth another attempt.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from trainer import run_layout
from trainer.errors import CapstanError, Stopped, StorageError, Superseded
from trainer.store import Store

WorkerErrors: TypeAlias = Mapping[int, BaseException]


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended. `error` is the ranks' own; None is a crash."""

    reason: str
    error: CapstanError | None


@dataclass(frozen=True)
class Decision:
    """Either `error` ends the run, or it starts again for `reason`."""

    reason: str
    error: CapstanError | None


class RankDied(Exception):
    """A rank's process is gone: killed, out of memory, or its machine with it."""


def classify(errors: WorkerErrors) -> Failure:
    """The cause among what the ranks died of.

    An error of ours comes first; then a rank that is gone, as the ranks left behind fail with broken connections.
    """
    ours = [(rank, error) for rank, error in sorted(errors.items()) if isinstance(error, CapstanError)]
    if ours:
        return Failure(str(ours[0][1]), ours[0][1])
    rank, error = min(errors.items(), key=lambda item: (not isinstance(item[1], RankDied), item[0]))
    first_line = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, RankDied):
        return Failure(f"rank {rank} died: {first_line}", None)
    return Failure(f"rank {rank} failed: {type(error).__name__}: {first_line}", None)


def decide(failures: Sequence[Failure], budget: int) -> Decision:
    """Another attempt, or the error that ends the run; `failures` are all so far, the newest last."""
    newest = failures[-1]
    if newest.error is not None and not _worth_another_attempt(newest.error):
        return Decision(newest.reason, newest.error)
    if len(failures) > budget:
        ending = f"{newest.reason} (failure {len(failures)}; retry.failures: {budget}). See `capstan logs`."
        return Decision(ending, type(newest.error)(ending) if newest.error else CapstanError(ending))
    return Decision(
        f"{newest.reason}. Starting again from the last commit ({len(failures)} of {budget} restarts).", None
    )


def _worth_another_attempt(error: CapstanError) -> bool:
    return isinstance(error, StorageError) and not isinstance(error, Superseded)


def record_end(run: Store, failure: Failure) -> None:
    """Write why the newest generation ended into its metrics, unless its rank 0 did.

    After a crash in any case: rank 0 is gone itself, or saw only a broken connection. A run that ended before it had a
    rank gets its first generation here.
    """
    keys = [entry.key for entry in run.list(run_layout.METRICS) if run_layout.generation_of(entry.key)]
    if not keys:
        keys = [run_layout.metrics(1)]
        run.create(keys[0], b"")
    lines = run.get(keys[-1])
    if failure.error is not None and b'"kind": "end"' in lines:
        return
    end = {"kind": "end", "outcome": _outcome(failure), "step": None, "reason": failure.reason}
    run.put(keys[-1], lines + json.dumps({**end, "time": round(time.time(), 3)}).encode() + b"\n")


def _outcome(failure: Failure) -> str:
    return "stopped" if isinstance(failure.error, Stopped) else "failed"
