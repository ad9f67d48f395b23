"""A stranger who does not know the secret of a start is not listened to by its heartbeat, and disturbs nobody."""

import json
import socket
import threading
from collections.abc import Iterator

import pytest

from trainer.train import heartbeat
from trainer.train.heartbeat import Line, Server, sign, verified

SECRET = b"of this start"


@pytest.fixture
def heard() -> list[object]:
    return []


@pytest.fixture
def server(heard: list[object]) -> Iterator[Server]:
    ours = Server("127.0.0.1", SECRET, lambda told: (heard.append(told), {"got": told})[1])
    yield ours
    ours.close()


def stranger(port: int, *lines: bytes) -> bytes:
    """The server's answer to lines sent one after the other."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        try:
            connection.sendall(b"".join(lines))
            return connection.recv(1000)
        except ConnectionError:
            return b""


def test_a_rank_gets_the_answer_to_what_it_tells(server: Server, heard: list[object]) -> None:
    line = Line("127.0.0.1", server.port, SECRET)
    assert [line.ask({"turn": turn}) for turn in range(3)] == [{"got": {"turn": turn}} for turn in range(3)]
    assert heard == [{"turn": 0}, {"turn": 1}, {"turn": 2}]


def test_the_end_of_a_run_says_nothing_of_a_rank_that_is_still_connected(caplog: pytest.LogCaptureFixture) -> None:
    before = set(threading.enumerate())  # another test's server may still be ending
    server = Server("127.0.0.1", SECRET, lambda told: told)
    line = Line("127.0.0.1", server.port, SECRET)
    assert line.ask("turn") == "turn"
    (thread,) = (thread for thread in set(threading.enumerate()) - before if thread.name == "heart-server")
    server.close()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert caplog.records == []


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        json.dumps({"hang": ["all of you", [0]]}).encode() + b"\n",
        sign(b"another secret", {"hang": ["all of you", [0]]}),
        sign(SECRET, {"a": 1}).replace(b'"a"', b'"b"'),
        b"\xff" * 2**21,
    ],
)
def test_a_line_without_the_secret_is_not_heard_or_answered(server: Server, heard: list[object], line: bytes) -> None:
    rank = Line("127.0.0.1", server.port, SECRET)
    rank.ask("before")
    assert stranger(server.port, line) == b""
    assert rank.ask("after") == {"got": "after"}
    assert heard == ["before", "after"]


def test_connections_that_say_nothing_keep_nobody_out_for_long(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "_STRANGERS", 4)
    monkeypatch.setattr(heartbeat, "_PATIENCE_SECONDS", 0.2)
    known = Line("127.0.0.1", server.port, SECRET)
    known.ask("before")
    silent = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(8)]
    assert known.ask("meanwhile") == {"got": "meanwhile"}
    assert [connection.recv(1) for connection in silent] == [b""] * 8  # hung up on
    assert Line("127.0.0.1", server.port, SECRET).ask("late") == {"got": "late"}


def test_however_many_say_nothing_a_rank_that_comes_later_is_heard(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_STRANGERS", 4)
    monkeypatch.setattr(heartbeat, "_PATIENCE_SECONDS", 60.0)
    silent = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(5)]
    assert silent[0].recv(1) == b"", "the oldest made room"
    rank = Line("127.0.0.1", server.port, SECRET)
    assert [rank.ask(turn) for turn in range(2)] == [{"got": 0}, {"got": 1}]
    silent += [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(5)]
    assert silent[5].recv(1) == b""
    assert rank.ask("still") == {"got": "still"}, "one that is known is no stranger"


def test_it_listens_at_one_address_only(server: Server) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", server.port), timeout=30)


def test_a_line_that_broke_is_made_again(server: Server) -> None:
    line = Line("127.0.0.1", server.port, SECRET)
    assert line.ask("before") == {"got": "before"}
    assert line._connection is not None
    line._connection.shutdown(socket.SHUT_RDWR)
    with pytest.raises(BrokenPipeError):
        line.ask("meanwhile")
    assert line.ask("after") == {"got": "after"}


def test_a_machine_that_does_not_know_its_own_address_listens_at_all_it_has(capfd: pytest.CaptureFixture[str]) -> None:
    ours = Server("192.0.2.1", SECRET, lambda told: told)  # no machine has this address (RFC 5737)
    assert "listens at every address, as it cannot at 192.0.2.1" in capfd.readouterr().err
    assert Line("127.0.0.1", ours.port, SECRET).ask("turn") == "turn"
    ours.close()


def test_an_address_of_version_6_is_listened_at_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    made, plain = list[tuple[str, int]](), socket.create_server

    def listens(address: tuple[str, int], *, family: int, backlog: int) -> socket.socket:
        made.append((address[0], family))
        return plain(("127.0.0.1", 0), backlog=backlog)

    monkeypatch.setattr(socket, "create_server", listens)
    for host in ("fd00::1", "127.0.0.1"):
        Server(host, SECRET, lambda told: told).close()
    assert made == [("fd00::1", socket.AF_INET6), ("127.0.0.1", socket.AF_INET)]


def test_an_answer_of_somebody_else_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        line = Line("127.0.0.1", impostor.getsockname()[1], SECRET)

        def answer() -> None:
            connection, _ = impostor.accept()
            connection.recv(1000)
            connection.sendall(sign(b"guess", {"hang": ["all", [0]]}))

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ConnectionError, match="not of the heartbeat's server"):
            line.ask("anything")


def test_what_is_signed_is_what_is_verified() -> None:
    told = {"rank": 3, "text": "line\nbreaks stay inside"}
    assert sign(SECRET, told).count(b"\n") == 1
    assert verified(SECRET, sign(SECRET, told)) == told
