"""Processes that read a bucket find out together how fast it may be asked, and none of them fails."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from trainer.errors import SlowDown, StorageError, Unreachable
from trainer.store.failures import slows
from trainer.store.pace import BUDGET, Pace


@dataclass
class Simulated:
    """Processes with eight threads each, and a bucket that allows `a_second` requests. No time passes outside of it."""

    processes: int
    a_second: float
    requests: int  # of each process
    now: float = 0.0
    refused: int = 0
    _paces: list[Pace] = field(default_factory=list)
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _tokens: float = 1e12
    _filled: float = 0.0
    _number: int = 0

    def seconds(self) -> float:
        """The time until all have read everything. They agree on their rates every second."""
        self._paces = [Pace(clock=lambda: self.now) for _ in range(self.processes)]
        left = [self.requests] * self.processes
        for number, pace in enumerate(self._paces):
            pace.set_rate(BUDGET / self.processes)
            for _ in range(8):
                self._begin(number, left)
        self._at(1.0, self._agree)
        while any(left) or len(self._events) > 1:
            self.now, _, event = heapq.heappop(self._events)
            event()
        return self.now

    def _at(self, time: float, event: Callable[[], None]) -> None:
        self._number += 1
        heapq.heappush(self._events, (time, self._number, event))

    def _agree(self) -> None:
        rate = sum(pace.rate for pace in self._paces) / len(self._paces)
        for pace in self._paces:
            pace.set_rate(rate)
        self._at(self.now + 1.0, self._agree)

    def _begin(self, number: int, left: list[int]) -> None:
        if left[number]:
            left[number] -= 1
            self._wait(number, left)

    def _wait(self, number: int, left: list[int]) -> None:
        turn = self._paces[number].take_turn()
        self._at(turn, lambda: self._ask(number, left, turn))

    def _ask(self, number: int, left: list[int], turn: float) -> None:
        self._tokens = min(self.a_second / 8, self._tokens + (self.now - self._filled) * self.a_second)
        self._filled = self.now
        if self._tokens >= 1:
            self._tokens -= 1
            self._at(self.now + 0.02, lambda: self._answered(number, left))
        else:
            self.refused += 1
            self._at(self.now + 0.005, lambda: self._refused(number, left, turn))

    def _answered(self, number: int, left: list[int]) -> None:
        self._paces[number].answered()
        self._begin(number, left)

    def _refused(self, number: int, left: list[int], turn: float) -> None:
        self._paces[number].lower(turn)
        self._at(self.now + 0.15, lambda: self._wait(number, left))


@pytest.mark.parametrize(
    ("processes", "a_second", "requests"), [(1, 20, 400), (3, 30, 200), (16, 100, 100), (64, 500, 150)]
)
def test_a_load_takes_little_more_than_the_requests_that_a_bucket_allows(
    processes: int, a_second: float, requests: int
) -> None:
    load = Simulated(processes, a_second, requests)
    assert load.seconds() <= 1.2 * processes * requests / a_second
    assert load.refused > 0


def test_a_bucket_that_refuses_nothing_is_soon_asked_as_fast_as_it_answers() -> None:
    assert Simulated(64, 1e9, 2000).seconds() <= 10


class Clock:
    """A time that only sleeping passes."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_request_is_refused_in_vain_for_as_long_as_others_are_answered() -> None:
    clock = Clock()
    pace, times = Pace(clock, clock.sleep), list[float]()

    def refused() -> str:
        times.append(clock.now)
        if clock.now < 50:
            pace.answered()
        elif clock.now > 75:
            return "answered"
        raise SlowDown("slow down")

    assert pace.ask(refused, patience=30) == "answered"
    with pytest.raises(SlowDown):
        Pace(clock, clock.sleep).ask(lambda: (_ for _ in ()).throw(SlowDown("slow down")), patience=30)
    assert clock.now < 120


def test_a_failing_bucket_is_asked_again_until_patience_ends_and_an_error_is_no_failure() -> None:
    clock, asked = Clock(), list[float]()

    def fails(error: Exception) -> None:
        asked.append(clock.now)
        raise error

    with pytest.raises(Unreachable):
        Pace(clock, clock.sleep).ask(lambda: fails(Unreachable("gone")), patience=30)
    assert 20 < clock.now <= 30
    assert 5 < len(asked) < 30
    asked.clear()
    with pytest.raises(StorageError, match="forbidden"):
        Pace(clock, clock.sleep).ask(lambda: fails(StorageError("forbidden")), patience=30)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("status", "slow"), [("503 Slow Down", True), ("429 Too Many Requests", True), ("500 Internal", False)]
)
def test_only_two_answers_ask_for_fewer_requests(status: str, slow: bool) -> None:
    assert slows(OSError(f"Server returned non-2xx status code: {status}: ")) == slow
