"""Every request to a server has the path and the body that vLLM documents, and each of its errors says what it means."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler
from types import SimpleNamespace
from typing import Any

import pytest

from tests.http_server import serving
from trainer.errors import CapstanError
from trainer.servers import Answer, CompletionsServer, NotServed, Pictured, Refused, again, computed_with

SERVED = {"token_ids": [7, 8], "logprobs": {"token_logprobs": [-0.5, -1.0]}}
PLACES = [None, {"3": {"logprob": -3.0}, "9": {"logprob": -1.0}, "5": {"logprob": -2.0}}]
PICTURED = Pictured([2, 3], [range(1, 2)], [{"type": "text", "text": "a"}], {"image_url": "<i>"}, {"more": {"fps": 2}})


def answering(status: int, asked: list[tuple[str, Any]], tokens: list[int]) -> AbstractContextManager[str]:
    """A server that notes each request, and answers all with this status and a whole answer to the prompt [2, 3]."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, None))
            self._send({"data": [{"id": "first", "parent": "base"}, {"id": "base"}]})

        def do_POST(self) -> None:
            asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            of_chat = {"prompt_token_ids": tokens, "prompt_logprobs": PLACES}
            drawn = {"content": [{"logprob": value} for value in (-0.5, -1.0)]}
            choice = {**SERVED, "prompt_logprobs": PLACES} | ({"logprobs": drawn} if "chat" in self.path else {})
            self._send({"tokens": [4, 5], "choices": [choice], **of_chat})

        def _send(self, found: Any) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(found).encode() if status == 200 else b"why " * 400)

        def log_message(self, format: str, *args: Any) -> None:
            """Keep quiet."""

    return serving(Handler)


OF_TOKENS = {"model": "first", "prompt": [2, 3]}
IDS = {"return_token_ids": True}
DRAWN = {"max_tokens": 2, "temperature": 1.0, "seed": 0, "prompt_logprobs": 0, "logprobs": 0, **IDS}
SAMPLED = {"n": 2, "max_tokens": 9, "temperature": 0.5, "seed": 4, "stop_token_ids": [1]}


@pytest.mark.parametrize(
    ("request_of", "path", "body", "found"),
    [
        (lambda one: one.ask([2, 3], 2), "completions", OF_TOKENS | DRAWN, Answer([-3.0], [7, 8], [-0.5, -1.0])),
        (
            lambda one: one.likeliest([2, 3], 2),
            "completions",
            {**OF_TOKENS, "max_tokens": 1, "prompt_logprobs": 2},
            [{9: -1.0, 5: -2.0}],
        ),
        (
            lambda one: one.ranked([2, 3]),
            "completions",
            {**OF_TOKENS, "max_tokens": 1, "prompt_logprobs": 1},
            [(-3.0, False)],
        ),
        (
            lambda one: one.sample("other", [2, 3], **SAMPLED),
            "completions",
            {"model": "other", "prompt": [2, 3], "logprobs": 0, **SAMPLED, **IDS},
            [([7, 8], [-0.5, -1.0])],
        ),
        (
            lambda one: one.tokens_of("a b"),
            "/tokenize",
            {"model": "first", "prompt": "a b", "add_special_tokens": False},
            [4, 5],
        ),
        (
            lambda one: one.has("other"),
            "/tokenize",
            {"model": "other", "prompt": "a", "add_special_tokens": False},
            True,
        ),
        (
            lambda one: one.load("one", "/folder"),
            "load_lora_adapter",
            {"lora_name": "one", "lora_path": "/folder"},
            None,
        ),
        (lambda one: one.unload("one"), "unload_lora_adapter", {"lora_name": "one"}, None),
        (lambda one: one.card(), "models", None, {"id": "first", "parent": "base"}),
    ],
    ids=["ask", "likeliest", "ranked", "sample", "tokens", "has", "load", "unload", "card"],
)
def test_a_request_is_what_the_server_documents(
    request_of: Callable[[CompletionsServer], Any], path: str, body: Any, found: Any
) -> None:
    asked = list[tuple[str, Any]]()
    with answering(200, asked, [2, 3]) as url:
        assert request_of(CompletionsServer("--server", url, "first")) == found
    assert asked == [(path if path.startswith("/") else f"/v1/{path}", body)]


def test_a_request_with_a_picture_is_a_message_that_brings_its_template_and_the_rate_of_its_frames() -> None:
    asked = list[tuple[str, Any]]()
    with answering(200, asked, [2, 3]) as url:
        found = CompletionsServer("--server", url, "first").ask(PICTURED, 2)
    ((path, body),) = asked
    template = body.pop("chat_template")
    assert found == Answer([-3.0], [7, 8], [-0.5, -1.0])
    assert path == "/v1/chat/completions"
    message = {"role": "user", "content": [{"type": "text", "text": "a"}]}
    of_chat = {"model": "first", "messages": [message], "add_generation_prompt": False, "more": {"fps": 2}}
    assert body == of_chat | DRAWN | {"logprobs": True}
    assert '{"image_url": "<i>"}' in template
    with answering(200, asked, [2, 4]) as url, pytest.raises(CapstanError, match="makes other tokens of a text with"):
        CompletionsServer("--server", url, "first").ask(PICTURED, 2)


@pytest.mark.parametrize(
    ("status", "kind", "of_adapter"),
    [(404, NotServed, NotServed), (400, Refused, CapstanError), (503, CapstanError, CapstanError)],
)
def test_an_error_says_what_it_means(
    status: int, kind: type[CapstanError], of_adapter: type[CapstanError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a model that the server does not know is one that it lacks; only a prompt is refused for good."""
    paused = list[float]()
    monkeypatch.setattr("trainer.servers.time", SimpleNamespace(sleep=paused.append))
    asked = list[tuple[str, Any]]()
    with answering(status, asked, []) as url:
        one = CompletionsServer("--server", url, "first")
        with pytest.raises(CapstanError, match=f"answered {status} to /v1/completions: why why") as caught:
            again(lambda: one.ranked([2, 3]), between=lambda: one.load("one", "/folder"))
        assert type(caught.value) is kind
        assert len(str(caught.value)) < 500
        assert (len(asked), paused) == ((1, []) if kind is Refused else (4 + 3, [2.0, 10.0, 30.0]))
        with pytest.raises(CapstanError) as caught:
            one.load("one", "/folder")
        assert type(caught.value) is of_adapter
        if status == 404:
            assert one.has("other") is False
        else:
            with pytest.raises(CapstanError, match="/tokenize"):
                one.has("other")


@pytest.mark.parametrize(
    ("weight", "others"),
    [
        ("layers.1.attn.k_proj.weight", ["layers.1.attn.q_proj.weight", "layers.1.attn.v_proj.weight"]),
        ("mlp.up_proj.weight", ["mlp.gate_proj.weight"]),
        ("attn.q_a_proj.weight", ["attn.kv_a_proj_with_mqa.weight"]),
        ("attn.in_proj_z.weight", ["attn.in_proj_qkv.weight"]),
        ("attn.in_proj_b.weight", ["attn.in_proj_a.weight"]),
        ("mlp.down_proj.weight", []),
    ],
)
def test_servers_compute_some_layers_as_one_matrix(weight: str, others: list[str]) -> None:
    assert computed_with(weight) == others
