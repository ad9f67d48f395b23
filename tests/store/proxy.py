"""A proxy before a real S3 server that loses, shortens, doubles or delays answers, and tells what it has done."""

import http.client
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Literal
from urllib.parse import urlsplit

from tests.http_server import serving

How = Literal["lost", "refused", "short", "cut", "twice", "late"]
"""lost: the request is done, and answered with 503. refused: it is not done, and answered with 503. short: the body of
the answer ends early, and its length says so. cut: the connection ends within the body of the answer. twice: the request is done twice, and the second answer is given. late:
the answer comes after `Fault.seconds`, when the client has asked again."""


@dataclass
class Fault:
    """Strikes the first `times` requests of `method` whose path matches `path`."""

    method: str
    path: str
    how: How
    times: int = 1
    seconds: float = 2.0
    struck: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def strikes(self, method: str, path: str) -> bool:
        with self._lock:
            hit = method == self.method and len(self.struck) < self.times and re.search(self.path, path) is not None
            if hit:
                self.struck.append(path)
            return hit


@dataclass
class Tokens:
    """As many requests a second as a bucket allows, and `most` of them at once. It counts those `given` and `refused`."""

    a_second: float
    most: float
    given: int = 0
    refused: int = 0
    _left: float = 0.0
    _at: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> bool:
        with self._lock:
            now = time.monotonic()
            self._left, self._at = min(self.most, self._left + (now - self._at) * self.a_second), now
            allowed = self._left >= 1
            self._left -= allowed
            self.given, self.refused = self.given + allowed, self.refused + (not allowed)
            return allowed


@contextmanager
def faulty_proxy(endpoint: str, faults: Sequence[Fault], tokens: Tokens | None = None) -> Iterator[str]:
    """The address of a proxy before the server at `endpoint`; the first of `faults` that a request meets decides.

    With `tokens` it asks to be asked more slowly once there are none.
    """
    server = urlsplit(endpoint).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if tokens is not None and not tokens.take():
                return self.answer(503, {}, b"<Error><Code>SlowDown</Code></Error>")
            fault = next((fault for fault in faults if fault.strikes(self.command, self.path)), None)
            if fault is None:
                return self.answer(*self.ask(body))
            if fault.how == "refused":
                return self.answer(503, {}, b"")
            status, headers, content = self.ask(body)
            if fault.how == "twice":
                status, headers, content = self.ask(body)
            elif fault.how == "lost":
                status, headers, content = 503, {}, b""
            elif fault.how == "short":
                content = content[: len(content) // 2]
            elif fault.how == "late":
                time.sleep(fault.seconds)
            elif fault.how == "cut":
                return self.answer(status, headers, content[: len(content) // 2], said=len(content))
            return self.answer(status, headers, content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_request

        def ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection(server, timeout=30)
            try:
                # The signature is over the headers as they came, that of the host among them.
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    connection.putheader(name, value)
                connection.endheaders(body)
                answer = connection.getresponse()
                return answer.status, dict(answer.headers), answer.read()
            finally:
                connection.close()

        def answer(self, status: int, headers: dict[str, str], content: bytes, said: int | None = None) -> None:
            """Answer. If `said` bytes are more than the content, the connection ends behind it."""
            dropped = {"connection", "transfer-encoding", "date", "server"}
            if self.command != "HEAD":
                dropped.add("content-length")
            try:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in dropped:
                        self.send_header(name, value)
                if self.command != "HEAD" or status == 503:
                    self.send_header("Content-Length", str(len(content) if said is None else said))
                self.end_headers()
                self.wfile.write(content)
                self.close_connection |= said is not None
            except (BrokenPipeError, ConnectionResetError):  # the client has given up
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    with serving(Handler) as url:
        yield url
