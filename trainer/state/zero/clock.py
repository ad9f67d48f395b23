"""The time that a rank's device spends in each phase of its steps, measured without waiting for the device.

    enter("data")   enter("forward")   enter("backward")   enter("optimizer")   enter("save")
         |   data          |  forward  [gather]  |  backward [gather]  |  optimizer   |   ...

A mark between two phases is an event in the device's own queue, or on a CPU the host's clock. The phases lie one behind
the other, so their seconds add up to the time that passes, and a wait inside of one is taken out of it. An event is
read once the device has come to it, which is after some exchange or at the latest in the next step: nobody waits for
one.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, ParamSpec, Protocol, Self, TypeVar

import torch

from trainer.processes.accelerator import is_accelerator, mark
from trainer.processes.hindered import CoreWaits

P = ParamSpec("P")
T = TypeVar("T")

# The most marks that wait to be read. An evaluation of many rows, which are not steps, would otherwise collect more and
# more.
_MOST_MARKS = 1024


class Mark(Protocol):
    """A moment in the work of a device."""

    def query(self) -> bool:
        """Whether the device has reached it."""
        ...

    def elapsed_time(self, end_event: Self, /) -> float:
        """Milliseconds from here to `end_event`, which the device has reached as well."""
        ...


class HostMark:
    """A moment of the host's clock, for a device that computes while the host calls."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end_event: "HostMark", /) -> float:
        return 1000 * (end_event._at - self._at)


class _Entered(NamedTuple):
    phase: str
    mark: Mark
    held_up: float  # seconds so far, on a CPU: see `Clock.held_up`


class Clock:
    """Adds up the seconds of each phase on this rank. It begins with the first `enter`; until then nothing is measured.

    Only one thread may be at it at a time: autograd's, while the main thread waits for a backward pass, or the main
    thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._entered: deque[_Entered] = deque()  # the marks that are still to be read, and the last one
        self._seconds: dict[str, float] = {}
        self._held_up: dict[str, float] = {}
        self._core_waits: CoreWaits | None = None

    def enter(self, phase: str) -> None:
        """End the previous phase and begin this one."""
        if not self._entered or self._entered[-1].phase != phase:
            self._entered.append(self._now(phase))
            if len(self._entered) > _MOST_MARKS:
                self._read()

    def _now(self, phase: str) -> _Entered:
        if is_accelerator(self._device):
            return _Entered(phase, mark(self._device), 0.0)
        if self._core_waits is None:  # in the thread that computes
            self._core_waits = CoreWaits()
        return _Entered(phase, HostMark(), self._core_waits())

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Inside, the phase is `phase`; afterwards it is the previous one again."""
        if not self._entered:
            yield
            return
        outer = self._entered[-1].phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(outer)

    def timed(self, phase: str, action: Callable[P, T]) -> Callable[P, T]:
        """`action`, whose time belongs to `phase`."""

        def within(*arguments: P.args, **given: P.kwargs) -> T:
            with self.within(phase):
                return action(*arguments, **given)

        return within

    def passed(self) -> dict[str, float]:
        """The seconds of each phase since the last call, up to where the device is."""
        self._read()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def held_up(self) -> dict[str, float]:
        """The seconds of each phase since the last call in which a rank that computes on a CPU was ready and had no
        core. Empty on other devices.
        """
        self._read()
        held_up, self._held_up = self._held_up, {}
        return held_up

    def _read(self) -> None:
        """Add up the time between the marks that the device has reached."""
        while len(self._entered) > 1 and self._entered[1].mark.query():
            phase, begin, held_up = self._entered.popleft()
            until = self._entered[0]
            self._seconds[phase] = self._seconds.get(phase, 0.0) + begin.elapsed_time(until.mark) / 1000
            if self._core_waits is not None:
                self._held_up[phase] = self._held_up.get(phase, 0.0) + until.held_up - held_up
