"""An answer of a server that streams is told token by token, and one of a server that does not, at its end."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from tests.http_server import serving
from trainer.errors import CapstanError, ConfigError
from trainer.servers import CompletionsServer


@pytest.fixture
def heard() -> threading.Event:
    """Set when the client has heard the first part."""
    return threading.Event()


def part(tokens: Any) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "text": "", "token_ids": tokens}]}).encode() + b"\n\n"


def answering(kind: str, parts: Sequence[bytes], heard: threading.Event | None = None) -> AbstractContextManager[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (asked["stream"], asked["model"], asked["prompt"]) == (True, "trained", [1, 2])
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            for number, data in enumerate(parts):
                if number == 1 and heard is not None:
                    assert heard.wait(60), "the first part was not told before the second was there"
                self.wfile.write(data)
                self.wfile.flush()

        def log_message(self, format: str, *args: Any) -> None:
            """Keep quiet."""

    return serving(Handler)


def written(url: str) -> Iterator[list[int]]:
    return CompletionsServer("--server", url, "trained").written("trained", [1, 2], max_tokens=9)


def test_parts_are_told_as_they_come(heard: threading.Event) -> None:
    parts = [part([5]), b": a comment\n\n", part([6, 7]), part([]), b"data: [DONE]\n\n"]
    with answering("text/event-stream; charset=utf-8", parts, heard) as url:
        found = list[list[int]]()
        for tokens in written(url):
            found.append(tokens)
            heard.set()
    assert found == [[5], [6, 7], []]


def test_a_server_that_does_not_stream_tells_all_at_once() -> None:
    whole = json.dumps({"choices": [{"text": "", "token_ids": [5, 6, 7]}]}).encode()
    with answering("application/json", [whole]) as url:
        assert list(written(url)) == [[5, 6, 7]]


@pytest.mark.parametrize(
    "second",
    [b'data: {"error": {"message": "engine died"}}\n\n', b"data: not json\n\n", part(None), part([-1]), part(["a"])],
)
def test_a_stream_that_breaks_is_one_sentence(second: bytes) -> None:
    with answering("text/event-stream", [part([5]), second]) as url:
        parts = written(url)
        assert next(parts) == [5]
        with pytest.raises(CapstanError, match=r"--server: http://.* answered /v1/completions without what vLLM gives"):
            next(parts)


def test_a_server_that_is_gone_is_one_sentence() -> None:
    with answering("text/event-stream", []) as url:
        pass
    with pytest.raises(ConfigError, match="does not answer"):
        list(written(url))
