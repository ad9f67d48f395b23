"""`capstan submit ray`: the driver as a job of a cluster that asks for a token."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from launcher.cluster.ray.cluster import _not_joined
from launcher.view.status import ENDED, read_generation, read_status
from tests.cli.conftest import ENVIRONMENT, editable_environment
from tests.forked import run_command
from tests.material import Workshop
from tests.ray.cluster import write
from tests.served_runs import until
from trainer.store.store import open_store

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

TOKEN = "0123456789abcdef0123456789abcdef"


@dataclass(frozen=True)
class Guarded:
    """A cluster of one machine: its own address, its dashboard's, and that of its Prometheus metrics."""

    address: str
    dashboard: str
    metrics: str


def with_token(token: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # a job's entrypoint is the cluster's own `python`
    return {**ENVIRONMENT, "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    ports = []
    for _ in range(4):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            ports.append(listener.getsockname()[1])
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=1"]
    command += [f"--port={ports[0]}", f"--dashboard-port={ports[1]}", "--node-ip-address=127.0.0.1"]
    command += [f"--metrics-export-port={ports[2]}", f"--object-store-memory={80 * 2**20}", "--disable-usage-stats"]
    # The agent takes jobs. Its usual port is that of a Ray of other tests, which run at the same time.
    command.append(f"--dashboard-agent-listen-port={ports[3]}")
    log = tmp_path_factory.mktemp("head") / "log"
    environment = {
        **with_token(TOKEN),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_metrics_report_interval_ms": "200",  # default 10 s, longer than the run
    }
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not _answers(f"http://127.0.0.1:{ports[1]}/api/version"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield Guarded(
            *(f"{scheme}127.0.0.1:{port}" for scheme, port in zip(("", "http://", "http://"), ports[:3], strict=True))
        )
    finally:
        os.killpg(process.pid, 15)
        try:
            process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


def _answers(url: str) -> bool:
    try:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
        return urllib.request.urlopen(request, timeout=5).status == 200
    except OSError:
        return False


def gauges(guarded: Guarded) -> set[str]:
    """Names of ours among the cluster's Prometheus metrics."""
    with urllib.request.urlopen(f"{guarded.metrics}/metrics", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return {line.partition("{")[0] for line in lines if line.startswith("ray_capstan_")}


def capstan(token: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_command(arguments, folder, with_token(token), 240)


def driver_log(uri: str, folder: Path) -> str:
    return json.loads(capstan(TOKEN, folder, "logs", uri, "--driver", "--json").stdout)["text"]


def test_a_submitted_run_is_a_job_of_the_cluster_and_its_folder_tells_the_rest(
    workshop: Workshop, tmp_path: Path, guarded: Guarded
):
    settings = (f"cluster.ray.address={guarded.dashboard}", "cluster.workers=1", "train.steps=40")
    config = write(tmp_path, workshop, "job", *settings)
    run = open_store(str(workshop.folder / "store")).sub("job")

    planned = capstan(TOKEN, tmp_path, "submit", "ray", config, "--dry-run", "--json")
    assert json.loads(planned.stdout)["dry_run"] is True
    assert not run.exists("config.yaml")

    wrong = capstan("f" * 32, tmp_path, "submit", "ray", config)
    assert wrong.returncode == 2
    assert "refused the token" in wrong.stderr.splitlines()[-1]
    assert "Traceback" not in wrong.stderr
    assert not run.exists("config.yaml")

    done = capstan(TOKEN, tmp_path, "submit", "ray", config, "--json")
    assert done.returncode == 0, done.stderr
    submitted = json.loads(done.stdout)
    assert submitted["run"] == "job"
    assert submitted["next"] == f"capstan status {submitted['uri']} --watch"
    expected = {f"ray_capstan_{name}" for name in ("step", "loss", "tokens_per_second", "restarts")}
    while gauges(guarded) != expected:
        assert read_status(run).state not in ENDED, f"{gauges(guarded)} when the run was over"
        time.sleep(0.2)
    watched = capstan(TOKEN, tmp_path, "status", run.uri, "--watch", "--json")
    status = json.loads(watched.stdout)
    assert (status["state"], status["step"]) == ("finished", 40)
    assert status["dashboard"].startswith("http://127.0.0.1:")
    assert run.exists("snapshot.tar.zst")
    deadline = time.monotonic() + 60  # the ranks have said that they are done; the driver ends a moment later
    while "finished" not in driver_log(run.uri, tmp_path).splitlines()[-1]:
        assert time.monotonic() < deadline
    assert read_status(run).generation == 1

    deadline = time.monotonic() + 240
    taken = capstan(TOKEN, tmp_path, "submit", "ray", config)
    while "ends it; a new run needs another name" in taken.stderr:  # the driver has said its last word, and is there
        assert time.monotonic() < deadline
        taken = capstan(TOKEN, tmp_path, "submit", "ray", config)
    assert taken.returncode == 2
    assert "exists and has checkpoints" in taken.stderr


def test_the_processes_of_a_job_run_in_the_environment_that_it_carries(
    workshop: Workshop, tmp_path: Path, guarded: Guarded
):
    path = editable_environment(tmp_path / "venv")["PYTHONPATH"]
    libraries = f"cluster.ray.runtime_env={{env_vars: {{PYTHONPATH: {path}}}}}"
    settings = (f"cluster.ray.address={guarded.dashboard}", "cluster.workers=1", "train.steps=300", libraries)
    config = write(tmp_path, workshop, "carried", *settings, "cluster.environment=archive")
    run = open_store(str(workshop.folder / "store")).sub("carried")
    submit = [tmp_path / "venv/bin/python", "-m", "launcher.cli", "submit", "ray", config]
    given = {**with_token(TOKEN), "PYTHONPATH": path}
    done = subprocess.run(submit, capture_output=True, text=True, cwd=tmp_path, env=given, timeout=300)
    assert done.returncode == 0, done.stderr
    until(lambda: read_generation(run, 1).get("start") or read_status(run).state in ENDED)
    begun = Path(f"/proc/{read_generation(run, 1)['start'][0]['pids'][0]}/environ").read_text().split("\0")
    until(lambda: read_status(run).state in ENDED)
    assert read_status(run).state == "finished"
    (home,) = [Path(line.partition("=")[2]) for line in begun if line.startswith("VIRTUAL_ENV=")]
    assert home.parent.name.startswith("capstan-environments-")
    assert (home / "editable/0/trainer/rank.py").is_file()
    shutil.rmtree(home)


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_a_wrong_token_or_none_is_called_so_by_train_too(
    workshop: Workshop, tmp_path: Path, guarded: Guarded, mode: str
):
    config = write(tmp_path, workshop, "unknown", f"cluster.ray.address={guarded.address}")
    done = run_command(["train", config], tmp_path, {**with_token("f" * 32), "RAY_AUTH_MODE": mode}, 300)
    assert done.returncode == 2
    assert f"the Ray cluster at '{guarded.address}' refused the token" in done.stderr.splitlines()[-1]
    assert "Unauthenticated" not in done.stderr


def test_another_version_of_ray_or_python_is_one_sentence():
    from ray._private.utils import check_version_info

    with pytest.raises(RuntimeError) as raised:
        check_version_info({"ray_version": "2.9.0", "python_version": "3.10.4"}, "process 1")
    said = str(_not_joined("head:6379", raised.value))
    assert "\n" not in said
    for word in ("Ray 2.9.0 and Python 3.10.4", f"Ray {ray.__version__} and Python", "Use the same"):
        assert word in said
