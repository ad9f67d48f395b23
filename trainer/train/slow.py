"""Finds ranks that are slower than the others, and says why where that can be told.

A rank tells the others how long its device was busy in the step before: its passes without their collectives, in which
it would wait for slower ranks, and its wait for data. All ranks hear the same numbers and conclude the same.

    step      | 1  2 | 3  4 | 5  6 | 7  8 | 9 10 | . .  | . .  | . 16 |   A rank is slow if it took longer than `SLOWER`
    rank 2    | 1.31 | 1.29 | 1.33 | 1.30 | 1.12 | 1.27 | 1.31 | 1.29 |   times the median of the others in all of these
                                                                          stretches but one.

A pause of a rank, such as other work on its machine, is over after some of them.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trainer.errors import SlowMachine, counted
from trainer.processes.hindered import Hindrance, quota
from trainer.run.lines import slow_sentence
from trainer.run.log import tell
from trainer.train.start import Start

SLOWER = 1.15
STRETCHES = 8
STRETCH_STEPS = 2
_EVEN = 1.08
"""A slow rank that is not slower than this in the middle one of the stretches is as fast as the others again."""

_QUOTA_STEPS = 4
"""A quota stops a rank in some steps and not in others, so a step counts with the mean of so many. With more of them a
rank is not named within 20 steps."""

_VARIES = 0.03
"""Work that varies by less than this share tells nothing of how time grows with it."""


class Busy(NamedTuple):
    """The work of a rank in a step: seconds that its device computed, seconds that it waited for data, the amount of
    its work in any unit, and how many reads of data it has repeated so far."""

    computed: float
    waited: float
    work: float
    repeated: float


class Lag(NamedTuple):
    """How much slower a rank is than the others: its time over theirs, how many seconds more a step takes it, and how
    many of them it waits longer for data. `repeated` is the number of reads that it repeated.
    """

    ratio: float
    seconds: float
    waited: float
    repeated: int


class Times:
    """The newest steps of all ranks. A rank that had no rows in a stretch is not judged by it."""

    def __init__(self) -> None:
        self._steps: deque[np.ndarray] = deque(maxlen=STRETCHES * STRETCH_STEPS)  # each (ranks, fields of Busy)
        self.slow: dict[int, Lag] = {}

    def add(self, ranks: Sequence[Busy]) -> None:
        """Add a step, and judge anew which ranks are `slow`."""
        self._steps.append(np.array(ranks))
        if len(self._steps) < STRETCHES * STRETCH_STEPS or len(ranks) < 2:
            return
        ratios = self._ratios(STRETCHES)
        second, middle = np.sort(ratios, 0)[1], np.median(ratios, 0)
        late = {rank for rank in range(len(ranks)) if second[rank] > SLOWER}
        late |= {rank for rank in self.slow if middle[rank] > _EVEN}
        self.slow = {rank: self.slow.get(rank) or self._lag(rank, float(middle[rank])) for rank in sorted(late)}

    def suspects(self) -> set[int]:
        """The ranks that were slower in the newest half of the stretches that decide."""
        if len(self._steps) < STRETCHES * STRETCH_STEPS // 2 or len(self._steps[0]) < 2:
            return set()
        return set(np.flatnonzero(self._ratios(STRETCHES // 2).min(0) > SLOWER).tolist())

    def _ratios(self, stretches: int) -> np.ndarray:
        """The time of each rank over the median of the others in the newest stretches: (stretches, ranks)."""
        steps = np.stack(list(self._steps)[-stretches * STRETCH_STEPS :])
        seconds, work = steps[:, :, 0] + steps[:, :, 1], steps[:, :, 2]
        growth = _growth(seconds, work)
        seconds, work = (of.reshape(stretches, STRETCH_STEPS, -1).sum(1) for of in (seconds, work))
        return np.stack([_slowness(took, done, growth) for took, done in zip(seconds, work, strict=True)])

    def _lag(self, rank: int, ratio: float) -> Lag:
        computed, waited, _, _ = np.stack(self._steps).mean(0).T
        repeated = self._steps[-1][rank][-1] - self._steps[0][rank][-1]
        others = np.arange(len(waited)) != rank
        more, longer = (float(of[rank] - np.median(of[others])) for of in (computed + waited, waited))
        return Lag(ratio, more, longer, round(repeated))


def _growth(seconds: np.ndarray, work: np.ndarray) -> float:
    """How a rank's time grows with its work from step to step, both (steps, ranks): 1 if twice the work takes twice the
    time, 0 if it takes no longer, as where launching the work takes longer than the work. 1 if the work hardly varies.
    """
    whole = (work > 0).all(0) & (seconds > 0).all(0)
    x, y = (np.log(of[:, whole]) - np.log(of[:, whole]).mean(0) for of in (work, seconds))
    return float(np.clip((x * y).sum() / (x * x).sum(), 0, 1)) if (x * x).sum() > _VARIES**2 * max(1, x.size) else 1.0


def _slowness(seconds: np.ndarray, work: np.ndarray, growth: float) -> np.ndarray:
    """The time of each rank over the median of the others', (ranks,). More work than theirs excuses a longer time;
    less work does not make a rank slow.
    """
    ratios, busy = np.zeros(len(seconds)), np.flatnonzero(work > 0)
    if len(busy) > 1:
        more = np.maximum(1.0, work[busy] / _medians_of_others(work[busy])) ** growth
        ratios[busy] = seconds[busy] / np.maximum(_medians_of_others(seconds[busy]), 1e-9) / more
    return ratios


def _medians_of_others(values: np.ndarray) -> np.ndarray:
    """For each of at least two values the median of all others."""
    order = np.argsort(values, kind="stable")
    sorted_values, place = values[order], np.empty(len(values), int)
    place[order] = np.arange(len(values))
    middle = [(len(values) - 2) // 2, (len(values) - 1) // 2]  # among the others, whose places close the gap
    return np.mean([sorted_values[np.where(place > at, at, at + 1)] for at in middle], axis=0)


class SlowRanks:
    """Names the slow ranks of a start in its log and records. Every method is collective."""

    def __init__(self, start: Start) -> None:
        self._start, self._times = start, Times()
        self._before: Sequence[Busy] = ()
        self._hindrance: Hindrance | None = None
        self._named: dict[int, str] = {}  # their machines
        self._quota_seconds = quota().seconds
        self._stopped: deque[float] = deque(maxlen=_QUOTA_STEPS)  # seconds of the newest steps, by the quota

    @property
    def to_replace(self) -> bool:
        """Whether the run should leave machines with slow ranks once it has committed."""
        return bool(self._named) and self._start.config.retry.slow_rank == "replace"

    def replaced(self, step: int) -> SlowMachine:
        """The error with which the ranks end after the commit of `step`, to be started again on other machines."""
        machines = sorted(set(self._named.values()))
        return SlowMachine(
            f"stopped at step {step} because {' and '.join(machines)} {'is' if len(machines) == 1 else 'are'} slower"
            " than the other machines, with a checkpoint committed",
            sorted(self._named),
            machines,
        )

    def own_seconds(self, spent: Mapping[str, float], held_up: Mapping[str, float]) -> float:
        """The seconds that this rank's device computed in a step, from those of its phases.

        A rank that computes on a CPU was `held_up` in them. Other programs that do so come and go, and do not count. A
        quota of CPU time counts. It lets a rank run and then stops it, so its part is the mean over some steps.
        """
        passes, held = (sum(of.get(phase, 0.0) for phase in ("forward", "backward")) for of in (spent, held_up))
        if not held_up:
            return passes
        before, self._quota_seconds = self._quota_seconds, quota().seconds
        share = held / max(sum(held_up.values()), 1e-9)  # of what held it up in its passes
        self._stopped.append(min(held, share * (self._quota_seconds - before)))
        return passes - held + sum(self._stopped) / len(self._stopped)

    def heard(self, step: int, computed: Iterable[float], ranks: Sequence[Busy]) -> None:
        """`ranks` have told what they did for the update that makes `step`, and what their devices have `computed` in
        the one before, which is when that is known.
        """
        if self._before:
            spent = zip(self._before, computed, strict=True)
            self._times.add([before._replace(computed=seconds) for before, seconds in spent])
        self._before = ranks
        slow = self._times.slow
        own = self._start.ranks.rank
        if own not in slow.keys() | self._times.suspects():
            self._hindrance = None
        elif self._hindrance is None:
            self._hindrance = Hindrance(self._start.ranks.device)
        if new := slow.keys() - self._named.keys():
            self._name(step, {rank: slow[rank] for rank in sorted(new)})
        for rank in sorted(self._named.keys() - slow.keys()):
            self._start.metrics.write("slow_rank", step=step, rank=rank, machine=self._named.pop(rank), over=True)

    def _name(self, step: int, slow: dict[int, Lag]) -> None:
        start, mine = self._start, None
        if start.ranks.rank in slow:
            assert self._hindrance is not None
            mine = start.starter.machine, self._hindrance.found()
        told = start.ranks.gather_objects(mine)
        for rank, lag in slow.items():
            machine, found = told[rank]
            why = "; ".join(filter(None, [_data(lag), found]))
            self._named[rank] = machine
            facts: dict[str, Any] = {"ratio": round(lag.ratio, 3), "more_seconds": round(lag.seconds, 4), "why": why}
            facts = {"step": step, "rank": rank, "machine": machine} | facts
            start.metrics.write("slow_rank", **facts)
            if rank == start.ranks.rank != 0:
                tell(slow_sentence({"kind": "slow_rank", **facts}))


def _data(lag: Lag) -> str:
    """A clause if a rank is slow because it waits for data, with at least half of its time lost to that."""
    if lag.waited < lag.seconds / 2:
        return ""
    repeated = f", {counted(lag.repeated, 'read')} repeated" if lag.repeated else ""
    return f"it waits {lag.waited:.2g} s a step longer for data from the store{repeated}"
