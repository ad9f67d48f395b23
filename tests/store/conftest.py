"""The stores that a test runs against."""

import re
from pathlib import Path

import pytest

from trainer.store import Store, open_store


@pytest.fixture(params=["memory", "local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty store of each kind."""
    if request.param == "memory":
        return open_store("memory://test")
    if request.param == "local":
        return open_store(str(tmp_path / "store"))
    name = re.sub(r"[^a-z0-9]+", "-", request.node.nodeid.rpartition("::")[2].lower())
    return open_store(f"{request.getfixturevalue('s3').uri('test-store')}/{name}")


def assert_one_line(error: Exception) -> None:
    """An error message is a sentence, not a debug rendering."""
    assert "\n" not in str(error)
    assert "Debug source" not in str(error)
    assert str(error).endswith(".")
