"""Decides what happens after a worker group ends: pure policy over the errors that ended its ranks.

A rank's own `CapstanError` distinguishes a mistake or a request from a crash. Errors of configuration, data and memory
would only come again, and a stop is intended. A crash, a failing store and wrong bytes are worth another attempt. Nodes
that leave are nobody's failure and have a budget of their own.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Any, Literal

from trainer.config import Retry
from trainer.errors import (
    CapstanError,
    Interrupted,
    MachineLeaves,
    NonFiniteLoss,
    NothingCommitted,
    Stopped,
    StorageError,
    Superseded,
    WrongBytes,
)

FailureKind = Literal["failure", "preemption", "resize"]


@dataclass(frozen=True)
class Failure:
    """Why an attempt ended.

    `error` is the ranks' own; None is a crash. `step` is the unfinished step; None before the first. `raised`: a rank
    has raised what ended it, while others were killed. `lost_machine`: a machine left, which is nobody's failure.
    `died`: the rank whose process ended by itself, and `died_at` when, in seconds since 1970, if a keeper has seen it.
    """

    reason: str
    error: CapstanError | None
    kind: FailureKind = "failure"
    step: int | None = None
    raised: bool = False
    lost_machine: bool = False
    died: int | None = None
    died_at: float | None = None

    @property
    def clause(self) -> str:
        """The reason without its period, to go on from."""
        return self.reason.removesuffix(".")

    @property
    def facts(self) -> dict[str, Any]:
        """The fields of the end record that programs read."""
        lost: dict[str, Any] = {"lost_machine": True} if self.lost_machine else {}
        if self.died is not None:
            lost["died"] = self.died
        return lost if self.died_at is None else {**lost, "died_at": self.died_at}


class RankDied(Exception):
    """A rank's process is gone: killed, out of memory, or with `node_lost` taken away with its node.

    Without `confirmed` another rank may have ended before: this one cannot be reached, or has aborted itself. `at` is
    when it ended, in seconds since 1970, if that is known. `killed`: it was killed, so it has nothing to tell.
    """

    def __init__(
        self,
        text: str,
        node_lost: bool = False,
        confirmed: bool = True,
        at: float | None = None,
        killed: bool = False,
    ) -> None:
        super().__init__(text, node_lost, confirmed, at, killed)
        self.node_lost = node_lost
        self.confirmed = confirmed
        self.at = at
        self.killed = killed

    def __str__(self) -> str:
        return str(self.args[0])


def lost_machine(which: str) -> Failure:
    return Failure(f"lost a machine: {which}", None, "preemption", lost_machine=True)


def classify(errors: Mapping[int, BaseException], *, resizing: bool = False) -> Failure:
    """Return the cause among the errors that ended the ranks.

    `resizing`: they were asked to end because more nodes had come. A lost node comes first, then an error of ours, then
    a rank that is gone: the ranks left behind fail with broken connections.
    """
    lost = sorted(rank for rank, error in errors.items() if isinstance(error, RankDied) and error.node_lost)
    if lost:
        return lost_machine(f"that of rank {', '.join(map(str, lost))}")
    ours = [(rank, error) for rank, error in sorted(errors.items()) if isinstance(error, CapstanError)]
    if ours:
        error = ours[0][1]
        kind: FailureKind = "failure" if not isinstance(error, Interrupted) else "resize" if resizing else "preemption"
        return Failure(str(error), error, kind, lost_machine=isinstance(error, MachineLeaves))
    rank, error = min(errors.items(), key=lambda item: (not isinstance(item[1], RankDied), item[0]))
    first_line = shorten(next(iter(str(error).strip().splitlines()), ""), 160, placeholder=" ...")
    if isinstance(error, RankDied):
        return Failure(f"rank {rank} died: {first_line}", None, died=rank, died_at=error.at)
    return Failure(f"rank {rank} failed: {type(error).__name__}: {first_line}", None, raised=True)


def first_cause(ends: Iterable[tuple[int, BaseException]], *, resizing: bool = False) -> Failure | None:
    """Return the cause among the errors of ranks, each with its number, in the order in which they ended.

    None without any. `resizing` is that of `classify`.
    """
    failures = dict(ends)
    # Ranks that lose another fail after it, whatever their numbers are.
    first = next(iter(failures), None)
    # Our errors and ranks that are gone are causes even if another rank has failed before.
    always = CapstanError | RankDied
    causes = {number: error for number, error in failures.items() if number == first or isinstance(error, always)}
    return classify(causes, resizing=resizing) if causes else None


def decide(
    ends: Sequence[Failure],
    rules: Retry,
    *,
    committed: bool,
    command: Callable[[str], str],
    place: str = "the last commit",
) -> str | CapstanError:
    """Return the sentence with which another attempt is made, or raise the error that ends the run.

    `ends` are all attempts' so far, the newest last. `committed`: the run has a checkpoint, so it can be resumed.
    `command` writes out the command that does a verb with the run. `place` is where another attempt goes on from.
    """
    newest = ends[-1]
    again = f"Starting again from {place}"
    if newest.kind == "resize":
        return f"{newest.clause}. {again}."
    if newest.kind == "preemption":
        return _after_preemption(ends, rules, committed, command, place)
    if isinstance(newest.error, NonFiniteLoss):
        before = sum(isinstance(end.error, NonFiniteLoss) for end in ends[:-1])
        if rules.skip_bad_window and not before:
            return f"{newest.clause}. {again}, without the rows of that step."
        return newest.error
    fails_again = not isinstance(newest.error, StorageError | WrongBytes) or isinstance(newest.error, Superseded)
    if newest.error is not None and fails_again:
        return newest.error
    see = f"{command('logs')} shows more."
    failures = [end for end in ends if end.kind == "failure" and not isinstance(end.error, NonFiniteLoss)]
    if newest.error is None and any(_is_certain(end, newest) for end in failures[:-1]):
        place = "before the first step" if newest.step is None else f"in step {newest.step}"
        return CapstanError(f"{newest.clause}. It is the second crash {place}, so another start would not help. {see}")
    if len(failures) > rules.failures:
        ending = f"{newest.clause} (failure {len(failures)}; retry.failures: {rules.failures}). {see}"
        return type(newest.error)(ending) if newest.error else CapstanError(ending)
    return f"{newest.clause}. {again} ({len(failures)} of {rules.failures} restarts)."


def _is_certain(before: Failure, newest: Failure) -> bool:
    """Return whether two crashes are one that comes at every start.

    They are in the same step, or have the same error before there was a step. Ranks that are killed while they start
    tell too little for that.
    """
    if newest.step is not None:
        return before.step == newest.step
    return newest.raised and (before.step, before.reason) == (None, newest.reason)


def _after_preemption(
    ends: Sequence[Failure], rules: Retry, committed: bool, command: Callable[[str], str], place: str
) -> str | CapstanError:
    newest, count = ends[-1], sum(end.kind == "preemption" for end in ends)
    if rules.preemptions is not None and count > rules.preemptions:
        ending = f"{newest.clause} (preemption {count}; retry.preemptions: {rules.preemptions})."
        if committed:
            return Stopped(f"{ending} {command('resume')} goes on.")
        return NothingCommitted(f"{ending} Nothing is committed: start it again from its configuration.")
    of = "" if rules.preemptions is None else f" of {rules.preemptions}"
    return f"{newest.clause}. Starting again from {place} (preemption {count}{of})."


def explained(failure: Failure, records: Iterable[Mapping[str, Any]]) -> Failure:
    """Return `failure` with facts of its generation's records: a hang that the ranks named, and their step."""
    records = list(records)
    hang = next((record["reason"] for record in records if "hung_ranks" in record), None)
    if failure.error is None and hang is not None:
        failure = replace(failure, reason=hang, died=None)
    begun = [record["step"] + 1 for record in records if record["kind"] in ("start", "step")]
    return replace(failure, step=max(begun, default=None))
