"""How fast a process reads from a bucket, so that thousands of processes do not ask it too much.

A bucket takes so many requests a second, and answers others with "slow down" (503 or 429). Each process has a rate. It
rises while the bucket answers all requests, and falls when one is refused. A refused request is asked again in its
turn, at the lower rate. The processes of a load begin with equal parts of one budget, and agree on their rates from
time to time (trainer/base/partitions/reading.py).
"""

import random
import time
from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import TypeVar

from trainer.errors import SlowDown, Unreachable

T = TypeVar("T")

# Requests a second of all processes of a load at its beginning. A prefix of S3 takes 5,500 once it is used to them.
BUDGET = 2000.0
_LEAST = 0.2
# Until the first refusal the rate doubles each second, then it rises by some percent. With a refusal it falls, at most
# so often, but not below the rate at which requests are answered.
_RISE, _RISE_ONCE_REFUSED = 1.0, 0.3
_FALL, _FALL_SECONDS = 0.8, 0.25
_ANSWERED_SECONDS = 2.0
# A refused request waits so long, and longer for its turn.
_REFUSED_PAUSE = 0.2
# Another failure than a refusal is repeated after a pause that grows.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 4.0


class Pace:
    """The rate of this process's requests to one bucket. Any thread may use it."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.rate = BUDGET
        self._clock, self._sleep, self._lock = clock, sleep, Lock()
        self._began = self._next = self._went_well = clock()
        self._lowered = self._began - _FALL_SECONDS
        self._refused = False
        self._answers = deque[float](maxlen=10_000)

    def ask(self, request: Callable[[], T], patience: float) -> T:
        """Make a request in its turn, and again while the bucket fails.

        Raises the request's own error; an `Unreachable` after so many seconds, which count anew while other requests of
        this process are answered, if the bucket only refuses this one.
        """
        began, pause = self._clock(), _FIRST_PAUSE
        while True:
            asked = self.take_turn()
            self._sleep(max(0.0, asked - self._clock()))
            try:
                result = request()
            except SlowDown:
                self.lower(asked)
                if self._clock() > max(began, self._went_well) + patience:
                    raise
                self._sleep(_REFUSED_PAUSE * random.uniform(0.5, 1.0))
            except Unreachable:
                if self._clock() + pause > began + patience:
                    raise
                self._sleep(pause * random.uniform(0.5, 1.0))
                pause = min(_LONGEST_PAUSE, 3 * pause)
            else:
                self.answered()
                return result

    def take_turn(self) -> float:
        """Return the time at which the next request may be made. It is then this one's."""
        with self._lock:
            turn = max(self._clock(), self._next)
            self._next = turn + 1 / self.rate
            return turn

    def answered(self) -> None:
        """Note that a request was answered: the rate rises if it is what requests wait for."""
        with self._lock:
            self._went_well = self._clock()
            self._answers.append(self._went_well)
            if self._next > self._went_well:
                self.rate += _RISE_ONCE_REFUSED if self._refused else _RISE

    def lower(self, asked: float) -> None:
        """Note that a request, made at the time `asked`, was refused. Others that were made with it count as one."""
        with self._lock:
            self._refused = True
            if asked >= self._lowered + _FALL_SECONDS:
                self._lowered = self._clock()
                self.rate = max(_LEAST, min(self.rate, max(_FALL * self.rate, self._answered_rate())))

    def _answered_rate(self) -> float:
        """The requests that were answered a second, lately."""
        now = self._clock()
        while self._answers and self._answers[0] < now - _ANSWERED_SECONDS:
            self._answers.popleft()
        return len(self._answers) / max(0.25, min(_ANSWERED_SECONDS, now - self._began))

    def set_rate(self, rate: float) -> None:
        """Take this rate from now on."""
        with self._lock:
            self.rate = max(_LEAST, rate)
