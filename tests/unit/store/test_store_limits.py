"""A store that does not answer is given up within `run.store_retry` and `run.store_timeout`, whoever opens it first."""

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from launcher.cluster.slurm import step
from launcher.data.data import build
from launcher.drive import local
from launcher.start import check
from tests.material import Workshop
from trainer.config import Config
from trainer.errors import StorageError
from trainer.store.store import open_run_store

# With the default limits one request alone would take longer.
pytestmark = pytest.mark.timeout(30)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("limits"))


@pytest.fixture
def config(shop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    """A run in a bucket of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "any")
        yield shop.config("mine", "run.store=s3://bucket/runs", "run.store_timeout=0.3", "run.store_retry=0.1")


def log(_: str) -> None: ...


def given_up() -> Any:
    return pytest.raises(StorageError, match=r"did not answer in time")


def test_before_a_run_starts(config: Config) -> None:
    with given_up():
        check.check(config, resume=False)


def test_by_who_repeats_failed_requests_itself(config: Config) -> None:
    store = open_run_store(config).sub("data")
    with given_up():
        store.failing_fast().get("manifest.json")
    assert store.pace is not None
    assert store.failing_fast().pace is None, "it repeats no request"


def test_as_data_is_compiled(config: Config) -> None:
    with given_up():
        build(config, dry_run=False, log=log)


def test_by_a_rank_of_torchrun_that_waits_for_compiled_data(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with given_up():
        local.start(config, resume=False, take_over=False, live=False, log=log)


def test_by_a_rank_of_srun_that_compiles(config: Config) -> None:
    with given_up():
        step._run(config, "1", rank=0)
