"""The stores that a test runs against."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.needs import need
from tests.store import servers
from trainer.store.store import Store, open_store

BUCKET = "test-store"


@pytest.fixture(scope="session")
def azurite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment for az:// on a real server."""
    need(servers.lack("azurite"))
    with servers.serve_azure(tmp_path_factory.mktemp("azurite"), BUCKET) as environment:
        yield environment


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment for s3:// on a second server."""
    need(servers.lack("moto"))
    with servers.serve_moto(tmp_path_factory.mktemp("moto"), BUCKET) as environment:
        yield environment


@pytest.fixture
def azure(azurite: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Store:
    """An empty folder of its own in a container."""
    _set(monkeypatch, azurite)
    return open_store(f"az://{BUCKET}/{_name(request)}")


@pytest.fixture(params=["memory", "local", "s3", "moto", "azure"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store of each kind."""
    if request.param == "memory":
        return open_store("memory://test")
    if request.param == "local":
        return open_store(str(tmp_path / "store"))
    if request.param == "azure":
        return request.getfixturevalue("azure")
    if request.param == "moto":
        _set(monkeypatch, request.getfixturevalue("moto"))
        return open_store(f"s3://{BUCKET}/{_name(request)}")
    return open_store(f"{request.getfixturevalue('s3').uri(BUCKET)}/{_name(request)}")


def _set(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def _name(request: pytest.FixtureRequest) -> str:
    return re.sub(r"[^a-z0-9]+", "-", request.node.nodeid.rpartition("::")[2].lower())


def assert_one_line(error: Exception) -> None:
    """An error message is a sentence, not a debug rendering."""
    assert "\n" not in str(error)
    assert "Debug source" not in str(error)
    assert str(error).endswith(".")
