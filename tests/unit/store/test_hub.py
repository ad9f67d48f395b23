"""Whether the Hub can be reached is asked once, of the mirror or the proxy that requests go through."""

import socket
from collections.abc import Iterator
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.store import hub


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("mirror", "host"),
    [
        (None, "huggingface.co:443"),
        ("https://mirror.here", "mirror.here:443"),
        ("http://mirror.here", "mirror.here:80"),
        ("http://mirror.here:8080/hub", "mirror.here:8080"),
    ],
)
def test_the_host_is_the_hubs_or_the_mirrors(monkeypatch: pytest.MonkeyPatch, mirror: str | None, host: str) -> None:
    if mirror:
        monkeypatch.setenv("HF_ENDPOINT", mirror)
    assert hub.hub_host() == host


@pytest.mark.parametrize(
    ("variables", "proxy"),
    [
        ({}, None),
        ({"https_proxy": "http://proxy.here:3128"}, "proxy.here:3128"),
        ({"https_proxy": "proxy.here:3128"}, "proxy.here:3128"),
        ({"https_proxy": "http://proxy.here"}, "proxy.here:80"),
        ({"https_proxy": "https://proxy.here"}, "proxy.here:443"),
        ({"all_proxy": "http://proxy.here:3128"}, "proxy.here:3128"),
        ({"http_proxy": "http://proxy.here:3128"}, None),
        ({"https_proxy": "http://proxy.here:3128", "no_proxy": "huggingface.co"}, None),
    ],
)
def test_a_proxy_counts_if_requests_to_the_hub_go_through_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], proxy: str | None
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert hub.proxy_host() == proxy


def test_whoever_listens_answers(monkeypatch: pytest.MonkeyPatch, listening: int) -> None:
    ask = hub.hub_answers.__wrapped__  # it remembers the first answer
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listening}")
    assert ask()
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    assert not ask()
    monkeypatch.setenv("HF_ENDPOINT", f"http://{'long' * 20}.here")
    assert not ask(), "no host has such a name"
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{listening}")
    monkeypatch.setenv("HF_ENDPOINT", f"http://mirror.here:{port}")
    assert ask(), "the proxy is there"


def test_an_address_of_version_6_is_asked_at_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[Any]()

    def connect(address: Any, _timeout: float) -> Any:
        asked.append(address)
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setenv("HF_ENDPOINT", "http://[fd00::1]:8080")
    assert hub.hub_answers.__wrapped__()
    assert asked == [("fd00::1", 8080)]


def test_an_answer_that_comes_too_late_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of the host takes long to be resolved, which no time limit of a connection ends."""

    def connect(_address: Any, _timeout: float) -> Any:
        Event().wait(0.2)
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(hub, "_PATIENCE_SECONDS", 0.01)
    assert not hub.hub_answers.__wrapped__()
