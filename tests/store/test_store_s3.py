"""The sentences that a user reads when S3 refuses, and the state that a killed server leaves (SeaweedFS)."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.smoke.local_s3 import S3Server
from tests.store.conftest import assert_one_line
from trainer.errors import AlreadyExists, StorageError
from trainer.store.store import Store, open_store


@pytest.fixture
def store(s3: S3Server, request: pytest.FixtureRequest) -> Store:
    """An empty folder of its own in one bucket."""
    return open_store(f"{s3.uri('test-store')}/{request.node.name}")


@pytest.mark.long
def test_many_buckets_have_room_on_any_disk(own_server: S3Server) -> None:
    for number in range(20):  # seven volumes each
        open_store(own_server.uri(f"bucket-{number}"), retry_seconds=0.1).put("key", b"x")


def test_wrong_credentials_are_refused_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("key", b"x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    wrong = open_store(store.uri)
    for use in (lambda: wrong.put("key", b"y"), lambda: wrong.get("key"), wrong.list, lambda: wrong.exists("key")):
        with within(seconds=2), pytest.raises(StorageError, match="403 Forbidden") as caught:
            use()
        assert_one_line(caught.value)
    assert store.get("key") == b"x"


def test_without_credentials_the_message_names_the_variables(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    # In place of a cloud's metadata service, which may be there, or take long to be missing.
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID") as caught:
        open_store(store.uri, retry_seconds=0.1).get("key")
    assert_one_line(caught.value)


def test_a_missing_bucket_is_named(s3: S3Server) -> None:
    missing = open_store("s3://no-such-bucket/runs")
    for use in (missing.list, lambda: missing.get("key")):
        with within(seconds=2), pytest.raises(StorageError, match="no-such-bucket/runs.*bucket does not exist"):
            use()
    # S3 itself says NoSuchBucket here too; SeaweedFS refuses to make the bucket.
    with within(seconds=2), pytest.raises(StorageError, match="cannot write s3://no-such-bucket/runs/key") as caught:
        missing.put("key", b"x")
    assert_one_line(caught.value)


def test_an_endpoint_nobody_listens_on_is_named(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(StorageError, match=r"http://127.0.0.1:1 cannot be reached \(Connection refused\)") as caught:
        open_store("s3://bucket/runs", retry_seconds=0.1).get("key")
    assert_one_line(caught.value)


def test_a_server_that_accepts_and_never_answers_is_given_up(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        store = open_store("s3://bucket/runs", request_seconds=0.3, retry_seconds=0.1)
        with (
            within(seconds=5),
            pytest.raises(StorageError, match=r"http://127.0.0.1:\d+ did not answer in time") as caught,
        ):
            store.put("key", b"x")
    assert_one_line(caught.value)


def test_what_was_put_outlives_a_killed_server(s3: S3Server, own_server: S3Server) -> None:
    assert own_server.endpoint != s3.endpoint
    store = open_store(own_server.uri("bucket"))
    committed = {f"key-{number}": os.urandom(100_000) for number in range(20)}
    for key, data in committed.items():
        store.create(key, data)
    own_server.kill()
    own_server.start()
    assert {key: store.get(key) for key in committed} == committed
    with pytest.raises(AlreadyExists):
        store.create("key-0", b"")


def test_a_request_waits_for_a_server_that_comes_back(own_server: S3Server) -> None:
    store = open_store(own_server.uri("bucket"))
    store.put("key", b"x")
    own_server.kill()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(store.get, "key")
        own_server.start()
        assert waiting.result(timeout=60) == b"x"


def test_a_server_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from launcher.smoke.local_s3 import S3Server\n"
        "with S3Server(Path(sys.argv[1])) as server: print(server._process.pid, flush=True); time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE) as parent:
        try:
            assert parent.stdout is not None
            server = int(parent.stdout.readline())
        finally:
            parent.kill()
    deadline = time.monotonic() + 60
    while alive(server):
        assert time.monotonic() < deadline, "the server outlived its parent"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """A killed process that nobody has reaped yet (state Z) is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_server_that_cannot_start_shows_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.smoke.local_s3._binary", lambda: "/bin/false")
    with pytest.raises(StorageError, match="ended with status 1: its log is empty"), S3Server(tmp_path):
        pass


def test_the_end_of_a_servers_log_says_why_it_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.smoke.local_s3._binary", lambda: "/bin/false")
    server = S3Server(tmp_path)
    server._log.write_text("".join(f"line {number}\n" for number in range(9)))
    running: Any = SimpleNamespace(poll=lambda: None)
    monkeypatch.setattr("launcher.smoke.local_s3._READY_SECONDS", -1.0)
    monkeypatch.setattr(server, "_ready", lambda: False)
    with pytest.raises(StorageError, match=r"was not ready within -1 s \(\d+\.\d GiB are free") as caught:
        server._wait_until_ready(running)
    assert str(caught.value).endswith(f"in {tmp_path}): line 4 | line 5 | line 6 | line 7 | line 8")
    ready = iter([False, True])
    monkeypatch.setattr("launcher.smoke.local_s3._READY_SECONDS", 60.0)
    monkeypatch.setattr(server, "_ready", lambda: next(ready))
    server._wait_until_ready(running)
    assert next(ready, None) is None


@pytest.mark.parametrize(
    ("status", "answer", "made"),
    [(201, b"{}", True), (409, b"/buckets/data already exists", True), (500, b"no volume", False)],
)
def test_a_bucket_is_made_unless_it_is_there(
    status: int, answer: bytes, made: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.smoke.local_s3._binary", lambda: "/bin/false")
    asked = list[Any]()
    monkeypatch.setattr("launcher.smoke.local_s3._request", lambda *given: asked.append(given) or (status, answer))
    server = S3Server(tmp_path)
    if made:
        assert server.uri("data") == "s3://data"
    else:
        with pytest.raises(StorageError, match="could not make the bucket 'data': b'no volume'"):
            server.uri("data")
    assert asked == [("POST", server._ports["filer"][0], "/buckets/data/")]


class within:
    """Fails when the block takes longer than `seconds`: a refusal must not be retried."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        assert time.monotonic() - self._start < self._seconds
