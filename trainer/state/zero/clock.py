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
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol, Self

import torch

from trainer.processes.accelerator import is_accelerator, mark

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


class Clock:
    """Adds up the seconds of each phase on this rank. It begins with the first `enter`; until then nothing is measured.

    Only one thread may be at it at a time: autograd's, while the main thread waits for a backward pass, or the main
    thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._entered: deque[_Entered] = deque()  # the marks that are still to be read, and the last one
        self._seconds: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """End the previous phase and begin this one."""
        if not self._entered or self._entered[-1].phase != phase:
            now = mark(self._device) if is_accelerator(self._device) else HostMark()
            self._entered.append(_Entered(phase, now))
            if len(self._entered) > _MOST_MARKS:
                self._read()

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

    def passed(self) -> dict[str, float]:
        """The seconds of each phase since the last call, up to where the device is."""
        self._read()
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _read(self) -> None:
        """Add up the time between the marks that the device has reached."""
        while len(self._entered) > 1 and self._entered[1].mark.query():
            phase, begin = self._entered.popleft()
            self._seconds[phase] = self._seconds.get(phase, 0.0) + begin.elapsed_time(self._entered[0].mark) / 1000
