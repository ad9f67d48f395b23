"""A run's threads see what it is asked for, with few requests, and outlive every failure."""

import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import StorageError
from trainer.run import layout
from trainer.run.background import Every, Harmless
from trainer.run.requests import (
    MACHINE_LEAVES,
    Stop,
    StopSignal,
    read_stop,
    request_restart,
    request_stop,
    stop_requester,
)
from trainer.store.store import Store, open_store


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


class Panic(BaseException):
    """Like those of obstore."""


@pytest.mark.parametrize(
    "failure", [StorageError("the bucket is away"), KeyError("reason"), Panic("a bug"), SystemExit(1)]
)
def test_a_thread_outlives_every_failure_and_says_it_once(
    failure: BaseException, capfd: pytest.CaptureFixture[str]
) -> None:
    again = threading.Event()
    calls: list[int] = []

    def flaky() -> None:
        calls.append(1)
        if len(calls) > 5:
            again.set()
        raise failure

    every = Every(0.001, flaky, "watching")
    assert again.wait(timeout=30)
    every.stop()
    said = capfd.readouterr().err
    assert said.count("watching failed, which does not end the run, and will be tried again") == 1
    assert f"tried again: {type(failure).__name__}: {failure}.\n" in said


def test_a_failure_after_a_success_is_said_again(capfd: pytest.CaptureFixture[str]) -> None:
    harmless = Harmless("sending")
    for fails in (True, True, False, True):
        harmless(lambda fails=fails: {}["away"] if fails else None)
    assert capfd.readouterr().err.count("sending failed") == 2


@pytest.mark.parametrize("asked", [KeyboardInterrupt, SystemExit])
def test_who_ends_the_process_in_its_main_thread_is_heard(asked: type[BaseException]) -> None:
    def ends() -> None:
        raise asked

    with pytest.raises(asked):
        Harmless("sending")(ends)


def test_a_thread_whose_last_result_nobody_needs_is_not_waited_for() -> None:
    """nvidia-smi may never answer."""
    begun, over = threading.Event(), threading.Event()
    every = Every(60, lambda: (begun.set(), over.wait(30)), "asking")
    every.now()
    assert begun.wait(30)
    before = time.monotonic()
    every.stop(wait=False)
    assert time.monotonic() - before < 20
    over.set()


def test_what_is_asked_for_now_is_done_once() -> None:
    done, called = list[int](), threading.Event()
    every = Every(60, lambda: (done.append(1), called.set()), "asking")
    every.now()
    assert called.wait(30)
    time.sleep(0.05)
    every.stop()
    assert len(done) == 1


def test_stop_and_restart_are_seen_in_turns(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    exists = Store.exists
    monkeypatch.setattr(Store, "exists", lambda self, key: (asked.append(key), exists(self, key))[1])
    stop = StopSignal(run, watches=False, seconds=60)
    for _ in range(3):
        stop._look()
    assert sorted(asked) == [layout.RESTART, layout.STOP, layout.STOP]
    assert stop.requested is Stop.NO
    request_restart(run, "because more machines have come")
    for _ in range(3):
        stop._look()
    assert (stop.requested, stop.reason) == (Stop.RESTART, "because more machines have come")
    request_stop(run)
    for _ in range(2):
        stop._look()
    assert (stop.requested, stop.reason) == (Stop.END, "on request")


def test_a_stop_request_may_have_a_reason(run: Store) -> None:
    request_stop(run, by="a search", reason="early, as others were better")
    stop = StopSignal(run, watches=False, seconds=60)
    for _ in range(2):
        stop._look()
    assert (stop.requested, stop.reason) == (Stop.END, "early, as others were better")


@pytest.mark.parametrize(
    ("content", "by", "reason", "logged"),
    [
        (b"", "somebody", "by somebody", "on request"),
        (b"now!", "somebody", "by somebody", "on request"),
        (b"\xff\xfe", "somebody", "by somebody", "on request"),
        (b"7", "somebody", "by somebody", "on request"),
        (b"null", "somebody", "by somebody", "on request"),
        (b'["me"]', "somebody", "by somebody", "on request"),
        (b"[" * 100_000, "somebody", "by somebody", "on request"),
        (b"{}", "somebody", "by somebody", "on request"),
        (b'{"by": "me"}', "me", "by me", "on request"),
        (b'{"reason": "to look at it"}', "somebody", "to look at it", "to look at it"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_stop_that_somebody_has_made_by_hand_stops_the_run_whatever_it_holds(
    run: Store, content: bytes, by: str, reason: str, logged: str
) -> None:
    run.put(layout.STOP, content)
    assert read_stop(run) == (by, reason)
    assert stop_requester(run) == by
    stop = StopSignal(run, watches=False, seconds=60)
    stop._look()
    assert (stop.requested, stop.reason) == (Stop.END, logged)
    run.delete(layout.STOP)
    assert (read_stop(run), stop_requester(run)) == (None, None)


def test_who_asks_without_a_name_is_told_by_process_and_host(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.run.requests.os.getpid", lambda: 12)
    monkeypatch.setattr("trainer.run.requests.socket.gethostname", lambda: "node-3")
    request_stop(run)
    assert read_stop(run) == ("process 12 on node-3", "by process 12 on node-3")


def test_nothing_is_looked_for_once_the_run_is_to_end(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = StopSignal(run, watches=False, seconds=60)
    stop.request()
    monkeypatch.setattr(Store, "exists", lambda self, key: pytest.fail("a request"))
    for _ in range(3):
        stop._look()


def test_a_machine_that_leaves_asks_for_a_restart_and_for_no_less_than_was_asked_before(run: Store) -> None:
    stop = StopSignal(run, watches=False, seconds=60, preempted=lambda: True)
    assert (stop.requested, stop.reason) == (Stop.RESTART, MACHINE_LEAVES)
    stop = StopSignal(run, watches=False, seconds=60, preempted=lambda: True)
    stop.request()
    assert (stop.requested, stop.reason) == (Stop.END, "on request")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_for_the_end_while_the_run_listens(number: signal.Signals, run: Store) -> None:
    def own(*_: object) -> None:
        """What the program did with it before."""

    stop, before = StopSignal(run, watches=False, seconds=60), signal.signal(number, own)
    try:
        with stop.on_signals():
            assert stop.requested is Stop.NO
            signal.raise_signal(number)
            assert (stop.requested, stop.reason) == (Stop.END, "on request")
        assert signal.getsignal(number) is own
        assert stop._watcher is None, "another rank looks for requests"
    finally:
        signal.signal(number, before)


def test_a_thread_leaves_the_signals_to_the_main_one(run: Store) -> None:
    stop, seen = StopSignal(run, watches=False, seconds=60), list[Any]()

    def listen() -> None:
        with stop.on_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_a_run_that_is_watched_sees_the_request_by_itself_until_it_is_closed(run: Store) -> None:
    request_stop(run)
    stop = StopSignal(run, watches=True, seconds=0.001)
    deadline = time.monotonic() + 30
    while stop.requested is Stop.NO and time.monotonic() < deadline:
        time.sleep(0.001)
    assert stop.requested is Stop.END
    watcher = stop._watcher
    stop.close()
    assert watcher is not None
    assert not watcher._thread.is_alive()


def test_a_restart_that_somebody_asks_for_does_not_hide_that_a_machine_leaves(run: Store) -> None:
    stop = StopSignal(run, watches=False, seconds=60, preempted=lambda: True)
    assert stop.requested is Stop.RESTART
    request_restart(run, "because more machines have come")
    for _ in range(3):
        stop._look()
    assert (stop.requested, stop.reason) == (Stop.RESTART, MACHINE_LEAVES)
