"""Two ranks of this machine, which their driver starts and watches itself."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from launcher.view.status import read_generation, read_status
from tests.cli.conftest import editable_environment
from tests.dist import runs
from tests.dist.launch import launch
from tests.material import Workshop
from tests.ray.cluster import Driver, alive, losses, write
from tests.served_runs import ENDS_SECONDS, SERVE, base_of, servers, sidecars, until
from tests.unit.export.test_served import stub
from trainer.config import dump_config
from trainer.run import layout
from trainer.run.segments import read_stream
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.store import open_store

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


def test_a_rank_that_is_killed_is_started_again_with_the_others(tmp_path: Path):
    workshop = Workshop(tmp_path)
    settings = "train.steps=40", "retry.failures=1"
    run = open_store(str(tmp_path / "store")).sub("killed")
    with Driver(tmp_path, "train", write(tmp_path, workshop, "killed", *settings)) as driver:
        pids = driver.wait_for(run, 1, step=6)["start"][0]["pids"]
        os.kill(pids[1], signal.SIGKILL)
        assert driver.end() == 0, driver.log.read_text()
    log = driver.log.read_text()
    assert log.count("launch: starts the processes of 2 ranks") == 2
    assert "rank 1 died: its process was killed by signal 9. Starting again from the last commit" in log
    assert (read_status(run).state, len(pids)) == ("finished", 2)
    assert not any(map(alive, [*pids, *read_generation(run, 2)["start"][0]["pids"]]))

    undisturbed = workshop.config("undisturbed", *settings, "checkpoint.every_steps=5")
    launch(2, runs.run, dump_config(undisturbed), workshop.prepare(undisturbed).train)
    assert losses(run, 1, 2) == losses(workshop.store.sub("undisturbed"), 1)


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder with a short path: that of an environment's Python has to fit into the first line of a script."""
    with TemporaryDirectory(prefix="k-") as folder:
        yield Path(folder)


def test_a_submitted_run_trains_in_the_environment_that_it_carries(tmp_path: Path, disk: Path):
    environment = editable_environment(tmp_path / "venv")
    workshop = Workshop(tmp_path)
    run = open_store(str(tmp_path / "store")).sub("carried")
    config = write(tmp_path, workshop, "carried", "train.steps=40", "cluster.environment=archive")
    command = [tmp_path / "venv/bin/python", "-m", "launcher.cli", "submit", "ray", config]

    def submit(*options: str, place: Path = disk, code: int = 0) -> str:
        own = {**environment, "TMPDIR": str(place)}
        given = {"capture_output": True, "text": True, "cwd": tmp_path, "env": own, "timeout": 200}
        done = subprocess.run([*command, *options], **given)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    (long := tmp_path / ("long" * 30)).mkdir()
    assert "is too long a path for the first line of a script" in submit(place=long, code=2)
    assert not run.list("")
    workshop.store.delete_folder("environments/")
    assert f"files of {tmp_path / 'venv'} (" in submit("--dry-run")
    assert not workshop.store.list("environments/")
    assert "environment: packing" in submit()
    until(lambda: read_generation(run, 1).get("step"), 300)
    begun = [Path(f"/proc/{pid}/cmdline").read_text() for pid in read_generation(run, 1)["start"][0]["pids"]]
    until(lambda: read_status(run).state == "finished")
    home = next(disk.glob("capstan-environments-*/*/READY")).parent
    assert [line.partition("\0")[0] for line in begun] == [str(home / "bin/python")] * 2
    assert (home / "editable/0/trainer/rank.py").is_file()


def test_the_process_that_asks_servers_lives_as_long_as_the_run(tmp_path: Path):
    workshop = Workshop(tmp_path)
    run, loaded = open_store(str(tmp_path / "store")).sub("asking"), set[str]()

    def answer(body: dict[str, Any]) -> Any:
        if "lora_name" in body:
            loaded.add(body["lora_name"])
            return b"done"
        if "max_tokens" not in body:  # whether it finds the adapter by itself
            return 404
        length = body["max_tokens"]
        choice = {"token_ids": [5] * length, "logprobs": {"token_logprobs": [-5.5] * length}}
        return {"choices": [choice] * body["n"]} if body["model"] in loaded else 404

    def asking() -> list[int]:
        commands = ((int(path.parent.name), path.read_bytes()) for path in Path("/proc").glob("[0-9]*/cmdline"))
        return [pid for pid, command in commands if b"\0rollout\0" + run.uri.encode() in command]

    with stub(answer) as url:
        settings = ("objective.name=grpo", "rollout.reward=length", f"rollout.engine=[{url}]", "rollout.max_tokens=3")
        config = write(tmp_path, workshop, "asking", *settings, "train.steps=12", "cluster.workers=1")
        with Driver(tmp_path, "train", config, real=True) as driver:  # processes are known by their commands
            driver.wait_for(run, 1, step=3)
            (first,) = asking()
            os.kill(first, signal.SIGKILL)
            assert driver.end() == 0, driver.log.read_text()
    assert "capstan rollout ended with exit code -9" in driver.log.read_text()
    assert asking() == []
    said = read_stream(run, layout.LOGS, layout.sidecar_log(1, "rollout")).decode()
    assert "the answers of step 12 are there" in said


def test_servers_start_and_end_with_the_run(tmp_path: Path):
    """One is killed, and then the driver; the run goes on and ends, and leaves nothing."""
    workshop = Workshop(tmp_path)
    run = open_store(str(tmp_path / "store")).sub("served")
    settings = (*SERVE, "rollout.serve.gpus=0", "rollout.serve.replicas=2", base_of(run), "train.steps=60")
    config = write(tmp_path, workshop, "served", *settings, "cluster.workers=1")
    with Driver(tmp_path, "train", config, real=True) as driver:
        driver.wait_for(run, 1, step=3)
        first, _ = until(lambda: len(found := servers(run)) == 2 and found)
        os.kill(first, signal.SIGKILL)
        until(lambda: len(found := servers(run)) == 2 and first not in found)
        driver.process.kill()
        driver.process.wait()
        until(lambda: not sidecars(run), ENDS_SECONDS)
    assert "ended with exit code -9" in driver.log.read_text()
    with Driver(tmp_path, "resume", "served", "--store", str(tmp_path / "store"), real=True) as driver:
        assert driver.end() == 0, driver.log.read_text()
    assert sidecars(run) == {}
    assert read_status(run).state == "finished"


def test_a_run_stops_while_its_data_is_compiled_and_while_it_saves(tmp_path: Path):
    workshop = Workshop(tmp_path)
    run = open_store(str(tmp_path / "store")).sub("stopped")

    # Its data takes some seconds: nothing is there to be committed, and the name is free again.
    many = tmp_path / "many.jsonl"
    many.write_text((json.dumps({"prompt": "p " * 40, "completion": "c " * 40}) + "\n") * 50_000)
    with Driver(tmp_path, "train", write(tmp_path, workshop, "stopped", f"data.train=[{{path: {many}}}]")) as driver:
        driver.wait_for_words("compiling train data")
        driver.signal(signal.SIGTERM)
        assert driver.end() == 7, driver.log.read_text()
        assert "nothing is committed" in driver.last_line("capstan: ")
    assert not run.exists("config.yaml")

    with Driver(tmp_path, "train", write(tmp_path, workshop, "stopped", "checkpoint.every_steps=1")) as driver:
        pids = driver.wait_for(run, 1, step=12)["start"][0]["pids"]
        driver.signal(signal.SIGUSR1)
        assert driver.end() == 75, driver.log.read_text()
    assert "on request" in read_status(run).reason
    assert committed_steps(run)[0] == read_status(run).step >= 12
    assert not run.exists("STOP")  # a signal's request ends with the process that got it
    assert not any(map(alive, pids))
