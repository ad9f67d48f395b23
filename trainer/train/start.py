"""One start of a run as one of its ranks sees it: the values that this rank needs for everything it does."""

import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from trainer.config import Config
from trainer.plan.resolve import Resolved
from trainer.processes.ranks import Team
from trainer.run.metrics import Metrics
from trainer.run.requests import StopSignal
from trainer.store.store import Store
from trainer.train.heartbeat.heartbeat import Pulse, silent_pulse
from trainer.tuning.objective.objective import Objective


@dataclass(frozen=True)
class Starter:
    """The values that only the program which started the ranks knows.

    Attributes:
        facts: for the start's record.
        machine: the name of this machine.
        preempted: tells whether a machine of the run is about to leave.
        observe: gets the record of each step on rank 0.
        began: when the start did, in seconds since 1970.
    """

    facts: Mapping[str, str] = field(default_factory=dict)
    machine: str = field(default_factory=socket.gethostname)
    preempted: Callable[[], bool] = lambda: False
    observe: Callable[[Mapping[str, float]], None] = lambda record: None
    began: float = field(default_factory=time.time)


class Elapsed:
    """Seconds since a start began, which was in another process and perhaps on another machine, from a time in seconds
    since 1970.

    This process measures its own part by a clock that is never set.
    """

    def __init__(self, began: float) -> None:
        self._entered = time.monotonic()
        self.launch_seconds = max(0.0, time.time() - began)

    @property
    def seconds(self) -> float:
        return round(self.launch_seconds + time.monotonic() - self._entered, 3)


@dataclass(frozen=True)
class ClaimedStart:
    """A start of the run that has its number, on this rank. `folder` is the run's own in the `store`, which also holds
    its data.
    """

    resolved: Resolved
    ranks: Team
    store: Store
    folder: Store
    generation: int
    starter: Starter = field(default_factory=Starter)
    elapsed: Elapsed = field(default_factory=lambda: Elapsed(time.time()))

    @property
    def config(self) -> Config:
        return self.resolved.config

    @property
    def objective(self) -> Objective:
        return self.resolved.objective

    def log(self, text: str) -> None:
        """Write a line to the run's log, which is rank 0's."""
        if self.ranks.rank == 0:
            print(text, flush=True)


@dataclass(frozen=True, kw_only=True)
class Start(ClaimedStart):
    """A start that can also write records, hears requests to stop, shows that it is alive, and has adapters written
    after commits.
    """

    metrics: Metrics
    stop: StopSignal
    pulse: Pulse = silent_pulse
    after_commit: Callable[[], None] = lambda: None
