"""The order in which the trials of a sweep have their turns: pure policy."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple


@dataclass(frozen=True)
class Candidate:
    """A trial that has not had its turn. `makes` are the things in the store that its run needs and runs share:
    compiled data and quantized bases, by the keys of their manifests. One that is `done` has only its figures to tell.
    """

    number: int
    makes: frozenset[str] = frozenset()
    done: bool = False


class End(NamedTuple):
    """How a trial's run ended; the reason is empty where it finished."""

    exit_code: int
    reason: str


@dataclass
class Turns:
    """The trials that are `waiting` for their turn and those that have it. Where several share something which is not
    made yet, one goes first, and the others wait until it is there; `made` tells. `room` is how many trials the cluster
    can train at once that are like the one of this number."""

    waiting: list[Candidate]
    made: Callable[[str], bool]
    room: Callable[[int], int]
    running: dict[int, Candidate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Those that are done first: what their figures were decides who is stopped early from now on.
        self.waiting = sorted(self.waiting, key=lambda trial: (not trial.done, trial.number))

    def next(self) -> int | None:
        """The trial to start now; it is running from here on. None where all that wait have to."""
        missing = {thing for trial in self.running.values() for thing in trial.makes if not self.made(thing)}
        training = sum(not trial.done for trial in self.running.values())
        for trial in self.waiting:
            if trial.done or (not trial.makes & missing and training < self.room(trial.number)):
                self.waiting.remove(trial)
                self.running[trial.number] = trial
                return trial.number
        return None

    def ended(self, number: int) -> None:
        self.running.pop(number, None)
