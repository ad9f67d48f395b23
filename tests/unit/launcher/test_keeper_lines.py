"""A keeper is asked for ranks over a line, and tells by it what becomes of each. Here a thread answers in its place."""

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.start import keeper
from launcher.start.keeper import Forked, Keeper, Unprepared, listening


class _Answering:
    """Gives every asker these answers, and ends its line once it is told to."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.name, self.answers = f"capstan-test-{secrets.token_hex(8)}", answers
        self.requests, self.heard = list[dict[str, Any]](), list[dict[str, Any]]()
        self.over = threading.Event()

    @contextmanager
    def listens(self) -> Iterator["_Answering"]:
        with listening(self.name) as line:
            thread = threading.Thread(target=self._answer, args=(line,), daemon=True)
            thread.start()
            yield self
            self.over.set()
            thread.join(30)

    def _answer(self, line: socket.socket) -> None:
        asker, _ = line.accept()
        with asker:
            _, files, _, _ = socket.recv_fds(asker, 2**16, 3)
            self.requests.append(json.loads(os.pread(files[0], 2**16, 0)))
            os.write(files[1], b"said")
            for file in files:
                os.close(file)
            for answer in self.answers:
                asker.send(json.dumps(answer).encode())
            asker.settimeout(0.01)
            while self.answers and not self.over.is_set():
                try:
                    data = asker.recv(2**16)
                except TimeoutError:
                    continue
                if not data:
                    return
                self.heard.append(json.loads(data))


def started(answering: _Answering, records: list[Any]) -> Forked:
    said, other = os.memfd_create("said"), os.memfd_create("other")
    try:
        rank = Keeper(answering.name).start(["task"], {"RANK": "3"}, outputs=(said, other), observe=records.append)
        assert os.pread(said, 99, 0) == b"said"
        return rank
    finally:
        os.close(said)
        os.close(other)


def test_a_rank_that_is_forked_tells_its_steps_and_how_it_ended() -> None:
    answers: list[dict[str, Any]] = [{"pid": 7}, {"step": {"loss": 2.0}}, {"ended": 3, "at": 5.0}]
    with _Answering(*answers).listens() as answering:
        records = list[Any]()
        rank = started(answering, records)
        assert (rank.pid, rank.wait(), rank.ended_at) == (7, 3, 5.0)
        assert (rank.poll(), rank.heard(60)) == (3, 3)
        assert records == [{"loss": 2.0}]
        assert answering.requests == [{"arguments": ["task"], "environment": {"RANK": "3"}}]


def test_a_rank_gets_signals_and_ends_with_its_keeper() -> None:
    with _Answering({"pid": 7}).listens() as answering:
        rank = started(answering, [])
        assert (rank.poll(), rank.heard(0.01)) == (None, None)
        rank.signal(signal.SIGTERM)
        rank.kill()
        deadline = time.monotonic() + 30
        while len(answering.heard) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert answering.heard == [{"signal": signal.SIGTERM}, {"signal": signal.SIGKILL}]
        answering.over.set()
        assert rank.wait() == -signal.SIGKILL
        rank.kill()  # nobody is there to hear it


@pytest.mark.parametrize(
    ("answers", "said"), [([{"refused": "it has a GPU"}], "it has a GPU"), ([], "the keeper has ended")]
)
def test_a_keeper_that_forks_none_says_why(answers: list[dict[str, Any]], said: str) -> None:
    with _Answering(*answers).listens() as answering, pytest.raises(Unprepared) as found:
        started(answering, [])
    assert str(found.value) == said


@pytest.mark.parametrize(("gpus", "said"), [(None, "any"), (0, "0"), (2, "2")])
def test_a_keeper_is_told_which_devices_its_ranks_have(gpus: int | None, said: str) -> None:
    line: Any = SimpleNamespace(fileno=lambda: 5)
    assert keeper.keeper_command(line, gpus)[1:] == ["-m", "launcher.start.keeper", "5", said]


def test_a_step_that_the_asker_is_too_busy_to_hear_of_delays_no_rank() -> None:
    asker, line = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kept: Any = None
    rank = keeper.ForkedHere({}, kept, line)
    with asker, line:
        for step in range(10_000):
            rank.stepped({"loss": float(step)})
        assert json.loads(asker.recv(99)) == {"step": {"loss": 0.0}}
        asker.setblocking(False)
        with suppress(BlockingIOError):
            while told := json.loads(asker.recv(99)):
                assert told["step"]["loss"] < 9_999, "the last ones found no room"


class _Gone(Keeper):
    def is_gone(self) -> bool:
        return True


@pytest.mark.parametrize("kind", [Keeper, _Gone])
def test_a_keeper_that_does_not_come_is_waited_for_until_it_is_gone(
    kind: type[Keeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind is Keeper:
        monkeypatch.setattr(keeper, "_CONNECT_SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(Unprepared, match="^the keeper has ended$"):
        kind("capstan-test-nobody").start([], {}, outputs=(1, 2))
    assert (time.monotonic() - began > 0.2) is (kind is Keeper)


def test_a_name_that_another_user_has_taken_is_no_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper.os, "geteuid", lambda: -1)
    name = f"capstan-test-{secrets.token_hex(8)}"
    with listening(name), pytest.raises(Unprepared, match="another user has taken the keeper's name"):
        Keeper(name).start([], {}, outputs=(1, 2))


def test_the_memory_of_a_rank_is_that_of_its_number_in_a_world_of_this_size(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, holders = keeper._Memory(), list[str]()
    monkeypatch.setattr(keeper, "_holder", holders.append)
    alone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    first, second = memory.of(alone), memory.of({**alone, "RANK": "1"})
    assert memory.of(alone) is first
    assert second is not first
    other_launcher = {"RANK": "1", "WORLD_SIZE": "2"}
    assert memory.of(other_launcher) is second
    assert holders == [], "all ranks are on this machine"
    os.fstat(first._files[0])
    larger = memory.of({"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1"})
    assert larger is not first
    assert holders == ["n1"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(second._files[0])  # its share is of another division
    larger.close()


def asking() -> tuple[socket.socket, keeper._Asker, selectors.BaseSelector]:
    """Who asks, and what the keeper has of them."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    asker, askers = keeper._Asker(theirs), selectors.DefaultSelector()
    askers.register(theirs, selectors.EVENT_READ, asker)
    return ours, asker, askers


def test_a_keeper_passes_signals_on_and_kills_the_rank_of_who_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    (ours, asker, askers), killed = asking(), list[tuple[int, int]]()
    monkeypatch.setattr(keeper.os, "kill", lambda *given: killed.append(given))
    request, files = {"arguments": ["task"], "environment": {"RANK": "3"}}, [os.memfd_create(name) for name in "abc"]
    os.write(files[0], json.dumps(request).encode())
    socket.send_fds(ours, [b"{}"], files)
    found = keeper._request(asker, askers)
    assert found is not None
    outputs, asked = found
    assert (len(outputs), asked) == (2, request)
    for file in (*files, *outputs):
        os.close(file)
    asker.pid = 7
    ours.send(json.dumps({"signal": signal.SIGUSR2}).encode())
    assert keeper._request(asker, askers) is None
    assert (killed, len(askers.get_map())) == ([(7, signal.SIGUSR2)], 1)
    ours.close()
    assert keeper._request(asker, askers) is None
    assert (killed[1:], len(askers.get_map())) == ([(7, signal.SIGKILL)], 0)


def test_a_keeper_tells_how_a_rank_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, asker, askers = asking()
    asker.pid, (ended, writes) = 7, os.pipe()
    askers.register(ended, selectors.EVENT_READ, asker)
    monkeypatch.setattr(keeper.os, "waitpid", lambda pid, _: (pid, 3 << 8))
    keeper._ended(asker, askers, ended)
    told = json.loads(ours.recv(99))
    assert (told["ended"], asker.pid, len(askers.get_map())) == (3, None, 0)
    assert abs(told["at"] - time.time()) < 60
    assert ours.recv(99) == b"", "the line is closed"
    ours.close()
    os.close(writes)


def test_a_forked_rank_has_a_session_and_signals_streams_and_variables_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (ours, asker, askers), done = asking(), list[Any]()
    other, writes = os.pipe()
    askers.register(other, selectors.EVENT_READ)
    monkeypatch.setattr(keeper.guard, "tie", lambda: done.append("tied"))
    monkeypatch.setattr(keeper.signal, "signal", lambda *given: done.append(given))
    monkeypatch.setattr(keeper.os, "setsid", lambda: done.append("session"))
    monkeypatch.setattr(keeper.os, "environ", {"RANK": "0", "HOME": "/me"})
    outputs = [(1001, sys.stdout.fileno()), (1002, sys.stderr.fileno())]
    with monkeypatch.context() as patch:
        patch.setattr(keeper.os, "close", lambda file: done.append(("closed", file)))
        patch.setattr(keeper.os, "dup2", lambda *given: done.append(given))
        keeper._become(asker, askers, os.getppid(), [1001, 1002], {"environment": {"RANK": "3"}})
    streams = [step for output in outputs for step in (output, ("closed", output[0]))]
    assert done == ["tied", (signal.SIGTERM, signal.SIG_DFL), "session", ("closed", other), *streams]
    assert keeper.os.environ == {"RANK": "3", "HOME": "/me"}
    for file in (other, writes):
        os.close(file)
    ours.close()
    asker.line.close()
