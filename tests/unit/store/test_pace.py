"""Processes that read a bucket find out together how fast it may be asked, and none of them fails."""

import heapq
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import obstore
import pytest
from obstore.store import MemoryStore

from trainer.errors import SlowDown, StorageError, Unreachable
from trainer.store.failures import passes, slows
from trainer.store.pace import BUDGET, Pace
from trainer.store.store import Paced, Store, _pace_of, open_store


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
    assert 8 < len(asked) < 30
    asked.clear()
    with pytest.raises(StorageError, match="forbidden"):
        Pace(clock, clock.sleep).ask(lambda: fails(StorageError("forbidden")), patience=30)
    assert len(asked) == 1


def test_a_request_waits_for_its_turn_and_a_quiet_time_saves_up_none() -> None:
    clock, asked = Clock(), list[float]()
    pace = Pace(clock, clock.sleep)
    for _ in range(3):
        pace.set_rate(10)
        pace.ask(lambda: asked.append(clock.now), patience=30)
    assert asked == pytest.approx([0.0, 0.1, 0.2])
    clock.now = 60.0
    pace.set_rate(10)
    assert [pace.take_turn(), pace.take_turn()] == pytest.approx([60.0, 60.1])


def test_the_rate_rises_where_requests_wait_for_it_and_falls_once_for_those_that_were_refused_together() -> None:
    clock = Clock()
    pace = Pace(clock, clock.sleep)
    pace.set_rate(0)
    assert pace.take_turn() < pace.take_turn() <= 5.0, "a rank asks now and then, whatever the mean of all is"
    pace.set_rate(100)
    clock.now = 10.0
    pace.answered()
    assert pace.rate == 100, "nobody waits for a turn"
    assert [pace.take_turn() for _ in range(3)] == [10.0, 10.01, 10.02]
    pace.answered()
    assert pace.rate == 101, "twice as many in a second"
    pace.set_rate(100)
    pace.lower(10.0)
    pace.lower(10.1)
    assert pace.rate == pytest.approx(80)
    pace.answered()
    assert pace.rate == pytest.approx(80.3), "more slowly from the first refusal on"
    clock.now = 20.0
    pace.lower(20.0)
    assert pace.rate == pytest.approx(0.8 * 80.3)
    for _ in range(190):
        pace.answered()
    pace.set_rate(100)
    clock.now = 21.0
    pace.lower(21.0)
    assert pace.rate == pytest.approx(95), "as many as were answered a second, lately"
    pace.set_rate(50)
    clock.now = 21.5
    pace.lower(21.5)
    assert pace.rate == 50, "no refusal raises it"
    pace.set_rate(400)
    clock.now = 40.0
    pace.lower(38.0)
    pace.lower(39.9)  # asked before the rate fell
    clock.now = 41.0
    pace.lower(40.2)  # asked as it fell, and answered late
    assert pace.rate == pytest.approx(320)


def test_at_its_beginning_a_process_counts_the_answers_of_the_time_that_it_has_had() -> None:
    clock = Clock()
    pace = Pace(clock, clock.sleep)
    pace.set_rate(120)
    clock.now = 0.5
    for _ in range(50):
        pace.answered()
    pace.set_rate(120)
    pace.lower(0.5)
    assert pace.rate == pytest.approx(100)


@pytest.mark.parametrize(
    ("status", "slow", "again"),
    [
        ("503 Slow Down", True, True),
        ("429 Too Many Requests", True, True),
        ("500 Internal", False, True),
        ("408 Request Timeout", False, True),
        ("404 Not Found", False, False),
        ("500 Internal, for http://169.254.169.254/latest/api/token", False, False),  # there are no credentials
    ],
)
def test_only_two_answers_ask_for_fewer_requests_and_more_for_another_try(status: str, slow: bool, again: bool) -> None:
    error = OSError(f"Server returned non-2xx status code: {status}: ")
    assert (slows(error), passes(error)) == (slow, again)


def test_the_folders_of_a_bucket_share_its_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("AWS_REGION", "eu-central-1")

    def pace(uri: str) -> Pace:
        paced = open_store(uri)._paced
        assert paced is not None
        return paced.pace

    assert pace("s3://one/runs/a") is pace("s3://one/bases/b") is pace("s3://one")
    assert pace("s3://one/runs") is not pace("s3://other/runs")


def test_every_read_of_a_bucket_takes_its_turn_and_is_asked_again_when_it_is_refused() -> None:
    """A whole object, one range, and each of several that are far from each other."""
    refusals, turns = Refusing(MemoryStore()), list[float]()
    pace = Pace(sleep=turns.append)
    store = Store("s3://bucket/folder", refusals.inner, paced=Paced(refusals.inner, pace, 30))
    content = bytes(range(256)) * 2**14
    store.put("key", content)
    far = 2 * 2**20

    def reads() -> list[bytes]:
        ranges = store.get_ranges("key", [1, 2, far], [3, 4, far + 2])
        return [store.get("key"), bytes(store.get_range("key", 5, 9)), *map(bytes, ranges)]

    expected = [content, content[5:9], content[1:3], content[2:4], content[far : far + 2]]
    assert reads() == expected
    assert len(turns) == 4
    with refusals.of(4):
        assert reads() == expected
    assert len(turns) == 4 + 4 + 4 + 4, "a pause and another turn for each refusal"


class Refusing:
    """A bucket that refuses some requests."""

    def __init__(self, inner: MemoryStore) -> None:
        self.inner = inner

    @contextmanager
    def of(self, count: int) -> Iterator[None]:
        left, lock = [count], Lock()

        def refused(plain: Callable[..., Any]) -> Callable[..., Any]:
            def ask(*arguments: Any, **options: Any) -> Any:
                with lock:
                    left[0] -= 1
                    refuses = left[0] >= 0
                if refuses:
                    raise OSError("Server returned non-2xx status code: 503 Slow Down: ")
                return plain(*arguments, **options)

            return ask

        with pytest.MonkeyPatch.context() as patch:
            for name in ("get", "get_range", "get_ranges"):
                patch.setattr(obstore, name, refused(getattr(obstore, name)))
            yield


def test_requests_of_a_process_to_one_bucket_have_one_pace_whatever_folder_they_are_for() -> None:
    assert _pace_of("s3://ours/runs/a") is _pace_of("s3://ours/data") is _pace_of("s3://ours")
    assert len({id(_pace_of(f"{place}/runs")) for place in ("s3://ours", "s3://theirs", "gs://ours")}) == 3
