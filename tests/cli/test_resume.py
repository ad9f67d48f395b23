"""Starting a run again, through the real command: what is refused, what a start leaves behind, and whose folder it
is.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.cli.conftest import ENVIRONMENT
from tests.forked import run_command
from tests.material import Workshop

RESUMED_TIMEOUT = 240  # a start imports torch, which takes long on a busy machine

pytestmark = pytest.mark.timeout(600)


def alone() -> dict[str, str]:
    """The environment of a group of one rank, as torchrun makes it: no Ray has to start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return {**ENVIRONMENT, **group, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def capstan(*arguments: object, cwd: Path, rank: bool = False) -> subprocess.CompletedProcess[str]:
    return run_command([*map(str, arguments)], cwd, alone() if rank else ENVIRONMENT, RESUMED_TIMEOUT)


@contextmanager
def started(*arguments: object, cwd: Path, rank: bool = False) -> Iterator["subprocess.Popen[str]"]:
    """The command as a process that goes on beside the test, and ends with it."""
    command = [sys.executable, "-m", "launcher.cli", *map(str, arguments)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=alone() if rank else ENVIRONMENT,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


def wait_for(path: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + RESUMED_TIMEOUT
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} does not appear"
        time.sleep(0.05)


def refused(done: subprocess.CompletedProcess[str], exit_code: int, *words: str) -> None:
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last, last


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below `folder` with its content and the time of its last change."""
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, workshop: Workshop) -> Path:
    """A store with the finished run `orig`, of two steps, each of them committed."""
    folder = tmp_path_factory.mktemp("trained")
    overrides = (f"run.store={folder / 'runs'}", "train.steps=2", "checkpoint.every_steps=1")
    tree = workshop.config("orig", *overrides).model_dump(mode="json")
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    done = capstan("train", "run.yaml", cwd=folder, rank=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def store(trained: Path, tmp_path: Path) -> Path:
    """A copy of that store, this test's own."""
    return Path(shutil.copytree(trained / "runs", tmp_path / "runs"))


def records(run: Path, generation: int, kind: str) -> list[dict]:
    found = [p for p in (run / "metrics").rglob("*") if p.is_file() and f"{generation:06d}" in str(p)]
    lines = [json.loads(line) for path in sorted(found) for line in path.read_text().splitlines()]
    return [record for record in lines if record["kind"] == kind]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tuning.alpha=320", ("alpha: 16", "320")),
        ("tuning.rank=32", ("rank: 8", "32")),
        ("quant.block_size=128", ("block_size: 64", "128")),
        ("run.seed=4", ("seed: 3", "4")),
        ("data.sequence_length=32", ("64", "32")),
        ("data.held_out=0.5", ("was trained on data", "sources give")),
        ("run.name=other", ("run.name: 'other'", "orig")),
        ("train.stepz=3", ("train.stepz: unknown setting",)),
    ],
)
def test_a_refused_resume_leaves_no_trace(store: Path, override: str, words: tuple[str, ...]) -> None:
    before = contents(store)
    refused(capstan("resume", "orig", override, cwd=store.parent, rank=True), 2, *words)
    assert contents(store) == before
    status = json.loads(capstan("status", "orig", "--json", cwd=store.parent).stdout)
    assert (status["state"], status["step"], status["generation"]) == ("finished", 2, 1)


def test_after_a_refused_resume_the_run_goes_on_and_exports_what_it_was_trained_with(store: Path) -> None:
    refused(capstan("resume", "orig", "tuning.alpha=320", cwd=store.parent, rank=True), 2, "alpha")
    done = capstan("resume", "orig", "train.steps=3", "optim.lr=0.002", cwd=store.parent, rank=True)
    assert done.returncode == 0, done.stderr
    changed = {record["setting"]: (record["old"], record["new"]) for record in records(store / "orig", 2, "change")}
    assert changed == {"train.steps": (2, 3), "optim.lr": (0.001, 0.002)}
    for text in (done.stderr, capstan("logs", "orig", cwd=store.parent).stdout):
        assert "train.steps is 3 from now on; it was 2" in text
    settings = yaml.safe_load((store / "orig" / "config.yaml").read_text())
    assert (settings["tuning"]["alpha"], settings["train"]["steps"]) == (16, 3)
    done = capstan("export", "orig", "adapter", cwd=store.parent)
    assert done.returncode == 0, done.stderr
    assert json.loads((store.parent / "adapter" / "adapter_config.json").read_text())["lora_alpha"] == 16


@pytest.mark.long
def test_what_the_ranks_refuse_does_not_stay_in_the_settings(store: Path) -> None:
    before = (store / "orig" / "config.yaml").read_bytes()
    done = capstan("resume", "orig", "model.attention=varlen", cwd=store.parent, rank=True)
    assert done.returncode == 2, done.stderr
    assert (store / "orig" / "config.yaml").read_bytes() == before


def test_a_copied_run_goes_on_in_its_own_folder(store: Path) -> None:
    shutil.copytree(store / "orig", store / "fork")
    before = contents(store / "orig")
    done = capstan("resume", "fork", "train.steps=3", "checkpoint.keep_last=1", cwd=store.parent, rank=True)
    assert done.returncode == 0, done.stderr
    assert contents(store / "orig") == before
    assert [p.parent.name for p in (store / "fork").rglob("manifest.json")] == ["step-000000003"]


@pytest.mark.long
def test_a_run_that_is_alive_is_not_taken_over_unless_that_is_asked_for(trained: Path, store: Path) -> None:
    shutil.copy(trained / "run.yaml", store.parent)
    mine = (f"run.store={store}", "run.name=alive", "train.steps=100000")
    with started("train", "run.yaml", *mine, cwd=store.parent, rank=True) as process:
        wait_for(store / "alive/checkpoints/step-000000001/manifest.json", process)
        resume = ("resume", "alive", "--store", store)
        refused(
            capstan(*resume, cwd=trained, rank=True),
            *(2, f"`capstan train` (process {process.pid} on {socket.gethostname()})"),
            *(f"`capstan stop alive --store {store}` ends it", "--take-over"),
        )
        refused(capstan("train", "run.yaml", *mine, cwd=store.parent, rank=True), 2, f"process {process.pid}")
        assert capstan(*resume, "--take-over", "--dry-run", cwd=trained).returncode == 0
        assert process.poll() is None
        process.kill()
        process.wait(timeout=30)
    assert capstan(*resume, "--dry-run", cwd=trained).returncode == 0, "a dead process has nothing to lose"


@pytest.mark.long
@pytest.mark.parametrize("ended_by", ["kill", "Ctrl-C", "Ctrl-C twice"])
def test_a_start_that_ends_before_its_first_record_leaves_its_name_free(trained: Path, store: Path, ended_by: str):
    shutil.copy(trained / "run.yaml", store.parent)
    mine = (f"run.store={store}", "run.name=early", "data.held_out=0.3")  # other data than what is compiled already
    with started("train", "run.yaml", *mine, cwd=store.parent) as process:
        wait_for(store / "early/logs/driver.log", process)
        if ended_by == "kill":
            process.kill()
        for _ in range(ended_by.count("C") and ended_by.count("twice") + 1):
            os.kill(process.pid, signal.SIGINT)
            time.sleep(0.5)  # two signals at once would be one
        said = process.communicate(timeout=300)[0]
    if ended_by == "Ctrl-C":
        assert process.returncode == 7, said
        assert "nothing is committed" in said.splitlines()[-1]
        assert not (store / "early/config.yaml").exists()
    else:
        assert process.returncode == (130 if ended_by == "Ctrl-C twice" else -signal.SIGKILL), said
        status = json.loads(capstan("status", "early", "--json", cwd=store.parent).stdout)
        assert status["state"] == "silent"
        assert "start it again" in status["reason"]
        refused(capstan("resume", "early", cwd=store.parent), 7, "Start it again")
    assert capstan("train", "run.yaml", *mine, "--dry-run", cwd=store.parent).returncode == 0
