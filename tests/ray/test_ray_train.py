"""Runs under a real Ray on this machine, started and ended by the `capstan` command itself."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launcher.status import read_generation, read_status
from tests.cli.conftest import ENVIRONMENT
from tests.material import Workshop
from trainer.manifest import committed_steps
from trainer.store import Store, open_store

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


class Driver:
    """A `capstan` process; leaving the context kills it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.log = folder / "driver.log"
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "launcher.cli", *arguments]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT, cwd=folder)

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def wait_for(self, run: Store, generation: int, step: int) -> dict:
        """The generation's records once it has reached `step` and committed something."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            records = read_generation(run, generation)
            if records.get("commit") and records["step"][-1]["step"] >= step:
                return records
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(f"step {step} was not reached: {self.log.read_text()}")

    def end(self) -> int:
        return self.process.wait(timeout=150)


def losses(run: Store, *generations: int) -> dict[int, float]:
    return {r["step"]: r["loss"] for number in generations for r in read_generation(run, number)["step"]}


def write(folder: Path, workshop: Workshop, name: str, *overrides: str) -> str:
    """Its paths are relative to `folder`, the driver's directory: ranks must find them too."""
    paths = {
        "run.store": workshop.folder / "store",
        "model.base": workshop.base,
        "sharding.deepspeed": workshop.policy,
    }
    relative = [f"{key}={os.path.relpath(path, folder)}" for key, path in paths.items()]
    relative.append(f"data.train=[{{path: {os.path.relpath(workshop.data, folder)}}}]")
    settings = ["cluster.workers=2", "train.steps=60", "checkpoint.every_steps=5", *relative, *overrides]
    config = workshop.config(name, *settings)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return str(path)


def test_a_killed_rank_is_replaced_and_a_stop_resumes_with_the_same_losses(workshop: Workshop, tmp_path: Path):
    """One run meets both: rank 1 is killed (-9), Ray's group starts again; then Ctrl-C, exit 75, and resume."""
    store = workshop.folder / "store"
    run = open_store(str(store)).sub("hurt")
    with Driver(tmp_path, "train", write(tmp_path, workshop, "hurt")) as driver:
        os.kill(driver.wait_for(run, 1, step=7)["start"][0]["pids"][1], signal.SIGKILL)
        driver.wait_for(run, 2, step=20)
        driver.process.send_signal(signal.SIGINT)
        assert driver.end() == 75, driver.log.read_text()
    before = read_status(run)
    assert before.state == "stopped"
    assert before.restarts[0].reason.startswith("rank ")
    assert before.step == committed_steps(run)[0]

    with Driver(tmp_path, "resume", "hurt", "--store", str(store), "--json") as driver:
        assert driver.end() == 0, driver.log.read_text()
    assert read_status(run).state == "finished"
    assert read_generation(run, 3)["start"][0]["step"] == before.step

    with Driver(tmp_path, "train", write(tmp_path, workshop, "undisturbed")) as driver:
        assert driver.end() == 0, driver.log.read_text()
    expected = losses(open_store(str(store)).sub("undisturbed"), 1)
    assert len(expected) == 60
    assert losses(run, 1, 2, 3) == expected


def test_a_mistake_found_by_a_rank_ends_the_run_at_once_with_its_sentence(workshop: Workshop, tmp_path: Path):
    config = write(tmp_path, workshop, "mistaken", "model.attention=varlen", "retry.failures=3")
    with Driver(tmp_path, "train", config) as driver:
        assert driver.end() == 2
        output = driver.log.read_text()
    assert "model.attention: 'varlen' cannot run here" in output.splitlines()[-1]
    assert "Traceback" not in output
    status = read_status(open_store(str(workshop.folder / "store")).sub("mistaken"))
    assert (status.state, status.generation) == ("failed", 1)
    assert json.dumps(status.to_json())
