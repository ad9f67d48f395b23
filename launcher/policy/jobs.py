"""Decides what the end of a job's work means, and whether the job starts again: pure policy over what the job saw.

The policy of launcher/policy/retry.py restarts ranks inside one job. This one restarts the whole job, after a time
limit, a lost node, or a driver that died. Both have two budgets: preemptions and lost nodes are free, failures are few.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

from trainer.errors import (
    ConfigError,
    DataError,
    DoesNotFit,
    NonFiniteLoss,
    NothingCommitted,
    NothingToResume,
    Stopped,
)

EndingKind = Literal["finished", "stopped", "preempted", "node lost", "failure", "mistake"]

RAY_DID_NOT_START = 70
"""The exit code by which the batch script says so (EX_SOFTWARE of sysexits.h)."""
FRUITLESS = 5
"""After so many starts in a row without a new commit the run ends: it would never get anywhere."""
BAD_NODE_FAILURES = 2
_SIGNALS = {
    "USR1": "Slurm's signal: the time limit was near, or the job was preempted",
    "TERM": "Slurm ended the job: scancel, a preemption, or the time limit",
}
_STOPPED = {Stopped.exit_code, NothingCommitted.exit_code}
_MISTAKES = {error.exit_code for error in (ConfigError, DataError, DoesNotFit, NonFiniteLoss, NothingToResume)}


@dataclass(frozen=True)
class Ending:
    """How the driver, or the ranks that srun started, ended, and what is known of the nodes by then.

    `signal` is what Slurm had sent: USR1 ahead of the end, TERM at the end, or nothing. `stopped_by` is a person's
    request. `lost_nodes` do not answer. `failed_nodes` holds the node of each rank that died, once for each death.
    `slow_nodes` are those that the run asked to leave because their ranks are slower than the others.
    `step` is the newest commit's. `reason` is the run's own, and `lost_machine` says whether the reason is a machine
    that left.
    """

    exit_code: int
    signal: str = ""
    stopped_by: str | None = None
    lost_nodes: Sequence[str] = ()
    failed_nodes: Sequence[str] = ()
    slow_nodes: Sequence[str] = ()
    step: int = 0
    reason: str = ""
    lost_machine: bool = False


@dataclass(frozen=True)
class Attempt:
    """One start of a job, as the run's folder records it.

    `ended` and `kind` are None while it runs, or if it was lost. `submission` tells the jobs of one `capstan submit
    slurm` from those of another. Times are seconds since 1970.
    """

    number: int
    submission: str
    job: int
    restart: int
    nodes: list[str]
    started: float
    ended: float | None = None
    exit_code: int | None = None
    kind: EndingKind | None = None
    reason: str = ""
    failed_nodes: list[str] = field(default_factory=list)
    step: int = 0
    goes_on: bool = True
    slow_nodes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class JobDecision:
    """Whether the job `goes_on`, without the nodes to `exclude`, or ends with `exit_code`."""

    goes_on: bool
    kind: EndingKind
    reason: str
    exit_code: int
    exclude: list[str] = field(default_factory=list)


def judge(ending: Ending, before: Sequence[Attempt], *, budget: int, supervised: bool) -> JobDecision:
    """Decide whether the job goes on.

    `before` are the earlier attempts of the same submission, oldest first. `budget` is the number of failures allowed.
    `supervised`: a driver has itself restarted dead ranks within the budget, so its own exit code 1 is final.
    """
    bad = bad_nodes(before, ending)
    kind, reason, again = _meaning(ending, supervised, newly_bad=bool(set(bad) & set(ending.failed_nodes)))
    if kind == "failure" and again:
        if _is_certain(before, ending, reason):
            twice = f"{reason}; it ended so twice at step {ending.step}, and another start would not help"
            return JobDecision(False, kind, twice, ending.exit_code or 1)
        failures = 1 + sum(attempt.kind == "failure" for attempt in before)
        if failures > budget:
            return JobDecision(
                False, kind, f"{reason} (failure {failures}; retry.failures: {budget})", ending.exit_code or 1
            )
    without_a_commit = takewhile(lambda attempt: attempt.step == ending.step, reversed(before))
    if again and len(list(without_a_commit)) + 1 >= FRUITLESS:
        reason = (
            f"{reason}; {FRUITLESS} starts in a row ended without a new commit (the newest is of step {ending.step}). "
            "Raise cluster.slurm.time or cluster.slurm.signal_seconds, or commit more often (checkpoint.every_minutes)."
        )
        return JobDecision(False, "failure", reason, ending.exit_code or 1)
    if again and bad:
        reason += f"; excluded from now on: {', '.join(bad)}"
    return JobDecision(again, kind, reason, Stopped.exit_code if again else ending.exit_code, bad if again else [])


def _meaning(ending: Ending, supervised: bool, *, newly_bad: bool) -> tuple[EndingKind, str, bool]:
    """Return (kind, reason, whether starting again is worth it)."""
    code, because = ending.exit_code, f": {ending.reason}" if ending.reason else ""
    if code == 0:
        return "finished", "", False
    if code in _STOPPED and ending.stopped_by:
        return "stopped", f"stopped by {ending.stopped_by}", False
    if ending.lost_nodes:
        return "node lost", f"no answer from {', '.join(ending.lost_nodes)}", True
    if code in _STOPPED and not ending.signal and ending.lost_machine:
        return "node lost", ending.reason, True  # Ray lost it, though Slurm still reaches it
    if code == Stopped.exit_code and not ending.signal:
        return "stopped", ending.reason or "stopped by request", False
    if code in _MISTAKES and not (code in _STOPPED and ending.signal):
        return "mistake", ending.reason or f"exit code {code}", False
    if ending.signal:
        return "preempted", _SIGNALS.get(ending.signal, ending.signal), True
    if newly_bad:
        return "failure", f"ranks died on the same node again{because}", True
    if code == RAY_DID_NOT_START:
        return "failure", "Ray did not start on the job's nodes; the job's output says why", True
    if code > 128:
        what = "the driver" if supervised else "the ranks' step"
        return "failure", f"{what} was killed by signal {code - 128}", True
    return "failure", ending.reason or f"exit code {code}", not supervised


def _is_certain(before: Sequence[Attempt], ending: Ending, reason: str) -> bool:
    """Return whether the start before ended by the same error of the run's own, with nothing committed since.

    Killed processes tell too little for that. A node on which ranks died is left out of the next start.
    """
    told = bool(ending.reason) and 0 < ending.exit_code < 128 and ending.exit_code != RAY_DID_NOT_START
    if not (told and before) or ending.failed_nodes:
        return False
    last = before[-1]
    return (last.kind, last.reason, last.step) == ("failure", reason, ending.step)


@dataclass(frozen=True)
class StandIn:
    """The nodes of the ranks that follow within a job, in the order of the ranks, and the spares that are left.

    `places` has the spare that takes the place of each node that is left out.
    """

    ranks: list[str]
    spares: list[str]
    places: dict[str, str] = field(default_factory=dict)

    @property
    def sentences(self) -> list[str]:
        return [f"{spare} takes the place of {node}" for node, spare in self.places.items()]


def stand_in(ranks: Sequence[str], spares: Sequence[str], out: Collection[str]) -> StandIn | None:
    """Have `spares` take the places of those nodes of `ranks` that are `out`. None if there are too few."""
    places = dict(zip([node for node in ranks if node in out], spares, strict=False))
    following = [places.get(node, node) for node in ranks]
    if set(following) & set(out):
        return None
    return StandIn(following, list(spares[len(places) :]), places)


def bad_nodes(before: Sequence[Attempt], ending: Ending) -> list[str]:
    """Return nodes on which ranks died at least twice, that were lost twice, or that were slow, over all attempts."""
    slow = {*ending.slow_nodes, *(node for attempt in before for node in attempt.slow_nodes)}
    earlier = [node for attempt in before for node in attempt.failed_nodes]
    deaths = Counter([*ending.failed_nodes, *ending.lost_nodes, *earlier])
    return sorted(slow | {node for node, count in deaths.items() if count >= BAD_NODE_FAILURES})
