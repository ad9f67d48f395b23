"""Records and logs of a run by the real command: it is killed at any moment, and all that is left is read as one."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.smoke.local_s3 import undisturbed_ports
from launcher.view.status import read_generation
from launcher.view.watch import read_log
from tests.cli.conftest import ENVIRONMENT
from tests.forked import run_command, start_module
from tests.material import Workshop
from trainer.config import dump_config
from trainer.run import layout
from trainer.state.checkpoint.manifest import committed_steps

pytestmark = pytest.mark.long

PATIENCE = 240.0


@contextmanager
def rank(tmp_path: Path, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """`capstan` as the only rank of a group, as srun would start it; killed at the end at the latest."""
    (port,) = undisturbed_ports(1)
    group = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = {**ENVIRONMENT, **group, "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "output").open("ab") as output:
        process = start_module(["launcher.cli", *map(str, arguments)], tmp_path, environment, output)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@pytest.mark.timeout(600)
def test_records_up_to_a_commit_survive_a_kill_and_all_starts_are_read_as_one(
    workshop: Workshop, tmp_path: Path
) -> None:
    # Nothing but a commit writes records: the first flush of the rhythm would come in an hour.
    rules = ("train.steps=400", "checkpoint.every_steps=3", "track.flush_seconds=3600")
    config = workshop.config("killed", *rules)
    path = tmp_path / "killed.yaml"
    path.write_text(dump_config(config))
    folder = workshop.store.sub("killed")
    deadline = time.monotonic() + PATIENCE
    with rank(tmp_path, "train", path) as process:
        while max(committed_steps(folder), default=0) < 6:
            assert process.poll() is None, (tmp_path / "output").read_text()
            assert time.monotonic() < deadline, (tmp_path / "output").read_text()
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    committed = max(committed_steps(folder))
    steps = [record["step"] for record in read_generation(folder, 1)["step"]]
    assert steps[:committed] == list(range(1, committed + 1))

    often = ("train.steps=60", "checkpoint.every_steps=20", "track.flush_seconds=0.02")
    with rank(tmp_path, "resume", folder.uri, *often) as process:
        assert process.wait(timeout=PATIENCE) == 0, (tmp_path / "output").read_text()
    records = read_generation(folder, 2)
    assert [record["step"] for record in records["step"]] == list(range(committed + 1, 61))
    assert [record["outcome"] for record in records["end"]] == ["finished"]
    # A stream that was written in pieces is one object at the end, and its key is the one of every version.
    keys = [entry.key for entry in folder.list(layout.METRICS)]
    assert keys == [layout.metrics(1), layout.metrics(2)]
    lines = folder.get(layout.metrics(2)).splitlines()
    assert sum(json.loads(line)["kind"] == "step" for line in lines) == 60 - committed
    assert "attention:" in read_log(folder, 0, generation=2)
    assert b"<svg" in folder.get(layout.REPORT)
    shown = run_command(["status", folder.uri, "--json"], tmp_path, ENVIRONMENT, 300)
    status = json.loads(shown.stdout)
    assert (status["state"], status["step"], status["generation"]) == ("finished", 60, 2)
