"""gs://, as far as that can be checked without a server of its kind: there is no emulator that obstore works with.

A stand-in answers each request as Google's documentation of its XML API says. It shows what we send and what a user
reads, not that Google's servers agree.
"""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tests.store.conftest import assert_one_line
from trainer.errors import AlreadyExists, ConfigError, NotFound, StorageError, Unreachable
from trainer.store.store import Store, open_store


class Google(ThreadingHTTPServer):
    """Buckets `box`, which holds `there`, and `busy`, which answers 503. `seen` has the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.seen: list[tuple[str, str, str | None]] = []
        self.address = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Google

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.seen.append((self.command, self.path, self.headers.get("x-goog-if-generation-match")))
        status, body = self._answer()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "ETag": '"1"', "x-goog-generation": 1}.items():
            self.send_header(name, str(value))
        self.send_header("Last-Modified", "Mon, 02 Mar 2026 09:12:00 GMT")
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

    def _answer(self) -> tuple[int, bytes]:
        bucket, _, key = self.path.removeprefix("/").partition("/")
        if "capstan@project" not in _claims(self.headers.get("Authorization", "")):
            return 401, _error("AuthenticationRequired", "Authentication required.")
        if bucket == "busy":
            return 503, b""
        if bucket != "box":
            return 404, _error("NoSuchBucket", "The specified bucket does not exist.")
        there = key == "runs%2Fthere"
        if self.command == "PUT":
            taken = there and self.headers.get("x-goog-if-generation-match") == "0"
            return (
                (412, _error("PreconditionFailed", "At least one of the preconditions failed."))
                if taken
                else (200, b"")
            )
        return (200, b"hello") if there else (404, _error("NoSuchKey", "The specified key does not exist."))

    def log_message(self, format: str, *args: object) -> None: ...


def _claims(authorization: str) -> str:
    """The claims of a token that a service account signs: a JWT is header.claims.signature in base64."""
    middle = authorization.removeprefix("Bearer ").split(".")[1:2]
    return "".join(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)).decode() for part in middle)


def _error(code: str, message: str) -> bytes:
    return (
        f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    )


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch) -> Iterator[Google]:
    with Google() as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("GOOGLE_BASE_URL", server.address)
        try:
            yield server
        finally:
            server.shutdown()


@pytest.fixture
def box(google: Google, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A folder of `google`, opened with a service account's file as Google's console writes it."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    account = {
        "type": "service_account",
        "client_email": "capstan@project.iam.gserviceaccount.com",
        "private_key_id": "1",
        "private_key": key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
        "token_uri": f"{google.address}/token",
    }
    (tmp_path / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
    return open_store("gs://box/runs", retry_seconds=0.1)


def test_requests_go_to_the_endpoint_signed_by_the_service_account(google: Google, box: Store) -> None:
    assert box.get("there") == b"hello"
    assert google.seen == [("GET", "/box/runs%2Fthere", None)]


def test_create_asks_that_there_be_no_object_yet(google: Google, box: Store) -> None:
    box.create("new", b"x")
    assert google.seen[-1] == ("PUT", "/box/runs%2Fnew", "0")
    with pytest.raises(AlreadyExists, match="gs://box/runs/there exists already"):
        box.create("there", b"x")
    box.put("there", b"x")
    assert google.seen[-1] == ("PUT", "/box/runs%2Fthere", None)


def test_a_missing_key_a_missing_bucket_and_a_busy_server_are_told_apart(box: Store) -> None:
    with pytest.raises(NotFound, match="gs://box/runs/no does not exist"):
        box.get("no")
    with pytest.raises(StorageError, match="gs://nobox/runs/no: the bucket does not exist"):
        open_store("gs://nobox/runs").get("no")
    with pytest.raises(Unreachable, match="503 Service Unavailable") as caught:
        open_store("gs://busy/runs", retry_seconds=0.1).get("no")
    assert_one_line(caught.value)


@pytest.mark.parametrize("text", [None, "not json", "{}", '{"type": "service_account"}'])
def test_a_service_account_that_cannot_be_read_is_refused_by_the_variable_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    if text is not None:
        (tmp_path / "account.json").write_text(text)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
    with pytest.raises(
        ConfigError, match="^run.store: 'gs://box/runs' cannot .*GOOGLE_APPLICATION_CREDENTIALS"
    ) as caught:
        open_store("gs://box/runs")
    assert_one_line(caught.value)


def test_an_endpoint_that_is_no_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOGLE_BASE_URL", "localhost:4443")
    with pytest.raises(ConfigError, match="^GOOGLE_BASE_URL: 'localhost:4443' is no address"):
        open_store("gs://box/runs")
