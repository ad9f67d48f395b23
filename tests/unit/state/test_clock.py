"""The seconds of a step's phases add up to the time that passes, on a device that is behind the host too, and nobody
waits for it.
"""

import time

import pytest
import torch

from trainer.state.zero import clock as clocks
from trainer.state.zero.clock import Clock

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Queue:
    """A device that comes to what the host asks for only when `arrive` says so. Reading an event before is an error, as
    with CUDA's, and so is every wait."""

    def __init__(self) -> None:
        self.now, self.seen = 0.0, -1.0
        self.read = 0
        queue = self

        class Event:
            def __init__(self, device: torch.device, *, enable_timing: bool) -> None:
                assert (device, enable_timing) == (CUDA, True)

            def record(self) -> None:
                self.at = queue.now

            def query(self) -> bool:
                return self.at <= queue.seen

            def synchronize(self) -> None:
                raise AssertionError("the host waits for the device")

            def elapsed_time(self, end: "Event") -> float:
                assert self.query()
                assert end.query()
                queue.read += 1
                return 1000 * (end.at - self.at)

        self.Event = Event

    def compute(self, seconds: float) -> None:
        self.now += seconds

    def arrive(self) -> None:
        self.seen = self.now


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    made = Queue()
    monkeypatch.setattr(torch, "Event", made.Event)
    return made


def step(clock: Clock, queue: Queue) -> None:
    for phase, seconds in (("data", 1), ("forward", 2), ("backward", 4), ("optimizer", 8), ("save", 16)):
        clock.enter(phase)
        queue.compute(seconds)
        if phase == "backward":
            with clock.within("gather"):
                queue.compute(32)
            queue.compute(4)


def test_each_phase_has_its_time_without_that_of_the_waits_in_it(queue: Queue) -> None:
    clock = Clock(CUDA)
    step(clock, queue)
    clock.enter("data")
    queue.arrive()
    assert clock.passed() == {"data": 1, "forward": 2, "gather": 32, "backward": 8, "optimizer": 8, "save": 16}
    assert clock.passed() == {}


def test_what_the_device_has_not_come_to_is_told_later(queue: Queue) -> None:
    clock = Clock(CUDA)
    step(clock, queue)
    assert clock.passed() == {}
    assert queue.read == 0
    queue.arrive()
    step(clock, queue)
    first = clock.passed()
    assert first == {"data": 1, "forward": 2, "gather": 32, "backward": 8, "optimizer": 8, "save": 16}
    queue.arrive()
    step(clock, queue)
    second = clock.passed()
    assert sum(first.values()) + sum(second.values()) == queue.seen


def test_nothing_is_measured_before_it_begins() -> None:
    clock = Clock(CPU)
    with clock.within("gather"):
        pass
    assert clock.passed() == {}
    clock.enter("data")
    clock.enter("forward")
    assert clock.passed().keys() == {"data"}


def test_the_time_of_an_action_is_its_phases_and_its_result_the_callers(queue: Queue) -> None:
    clock = Clock(CUDA)

    def swap(sizes: list[int], *, backwards: bool) -> list[int]:
        queue.compute(3)
        return sizes[::-1] if backwards else sizes

    clock.enter("forward")
    assert clock.timed("swap", swap)([1, 2], backwards=True) == [2, 1]
    queue.compute(4)
    clock.enter("backward")
    queue.arrive()
    assert clock.passed() == {"forward": 4.0, "swap": 3.0}


def test_on_a_cpu_the_hosts_clock_counts() -> None:
    clock = Clock(CPU)
    began = time.perf_counter()
    clock.enter("forward")
    with clock.within("gather"):
        time.sleep(0.02)
    clock.enter("backward")
    clock.enter("save")
    passed, took = clock.passed(), time.perf_counter() - began
    assert passed.keys() == {"forward", "gather", "backward"}
    assert 0.02 <= passed["gather"] <= sum(passed.values()) <= took


def test_many_phases_that_nobody_reads_take_little_memory(queue: Queue) -> None:
    """Those of an evaluation of many rows, which are no steps."""
    clock = Clock(CUDA)
    for _ in range(2000):
        clock.enter("forward")
        queue.compute(1)
        clock.enter("data")
        queue.compute(2)
        queue.arrive()
    assert len(clock._entered) <= 1025
    clock.enter("save")
    queue.arrive()
    assert clock.passed() == {"forward": 2000.0, "data": 4000.0}


def test_a_rank_on_a_cpu_tells_how_long_it_had_no_core_in_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = iter([1.0, 1.5, 4.5, 4.5])
    monkeypatch.setattr(clocks, "CoreWaits", lambda: lambda: next(waited))
    clock = Clock(CPU)
    for phase in ("data", "forward", "data", "save"):
        clock.enter(phase)
    assert clock.held_up() == {"data": 0.5, "forward": 3.0}
    assert clock.held_up() == {}
