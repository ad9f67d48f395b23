"""A real vLLM serves an export beside its base: `export --verify --server` finds it right, and the base alone beside it, and `evaluate --server` measures
what the ranks do."""

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.view.status import read_generation
from tests.cli.conftest import ROOT, Capstan
from tests.dist.test_evaluate import write_tasks
from tests.material import Workshop, commit, make_data
from tests.needs import need
from tests.ray.cluster import Driver, alive, write
from tests.served_runs import sidecars, until
from trainer.processes import children, guard
from trainer.store.store import open_store

VLLM = ROOT / ".servers/vllm"
# Each saves something on processors that others use too: memory for keys and values in GiB, threads that wait without turning, the compilation of
# the sampler by g++.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "2",
    "KMP_BLOCKTIME": "0",
    "OMP_WAIT_POLICY": "passive",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
}
# Not the head: with an adapter's wrapper around it, a request for the prompt's log-probabilities ends this vLLM on a CPU.
TARGETS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


def start_vllm(base: Path, log: Path, port: int, *options: str, **variables: str) -> "subprocess.Popen[bytes]":
    """A server of `base` that takes adapters, as a group of processes; `variables` are some more of its environment."""
    given = ["serve", str(base), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "base"]
    given += ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--enable-lora"]
    given += ["--lora-target-modules", *TARGETS, *options]
    environment = {**os.environ, **ENVIRONMENT, **variables, "PATH": f"{VLLM}/bin{os.pathsep}{os.environ['PATH']}"}
    with log.open("w") as out:
        command = [str(VLLM / "bin/vllm"), *given]
        return children.start(command, stdout=out, stderr=out, env=environment, start_new_session=True)


@contextmanager
def vllm(base: Path, log: Path, *options: str, **variables: str) -> Iterator[str]:
    """The address of such a server, once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with start_vllm(base, log, port, *options, **variables) as process:
        try:
            while not _is_ready(f"http://127.0.0.1:{port}"):
                assert process.poll() is None, log.read_text(errors="replace")[-3000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_real_server_serves_what_was_exported(tmp_path: Path, capstan: Capstan) -> None:
    need(None if (VLLM / ".installed").exists() else "there is no vLLM: `make vllm` installs one")
    workshop = Workshop(tmp_path, hidden_size=128)  # vLLM wants heads of 32
    exact = ("model.dtype=fp32", "quant.type=none")
    config = workshop.config("done", f"tuning.targets=[{', '.join(TARGETS)}]", *exact)
    commit(workshop.store.sub("done"), config, dataset=workshop.prepare(config).train)
    export = ("export", "done", str(tmp_path / "adapter"), f"--store={workshop.folder}/store")
    assert capstan(*export, timeout=600).returncode == 0
    with vllm(workshop.base, tmp_path / "vllm.log", "--lora-modules", f"done={tmp_path}/adapter") as url:
        served = capstan(*export, "--verify", "--server", url, timeout=600)
        assert served.returncode == 0, served.stderr
        assert "log-probabilities of done" in served.stdout
        alone = capstan(*export, "--verify", "--server", f"{url}#base", timeout=600)
        assert alone.returncode == 1
        assert "It answers as the base alone" in alone.stderr
        make_data(tmp_path / "task.jsonl", documents=7, seed=8)
        write_tasks(tmp_path / "tasks")
        evaluate = (
            "evaluate",
            "done",
            export[-1],
            f"--set=task={tmp_path}/task.jsonl",
            f"--tasks={tmp_path}/tasks",
            "--json",
        )
        theirs, ours = (capstan(*evaluate, *more, timeout=600) for more in (("--server", url, "--step=4"), ()))
    assert theirs.returncode == ours.returncode == 0, theirs.stderr + ours.stderr
    served, here = json.loads(theirs.stdout), json.loads(ours.stdout)
    assert served["server"] == f"{url}#done"
    for side in ("base", "adapter"):
        assert served["sets"]["task"][side]["loss"] == pytest.approx(here["sets"]["task"][side]["loss"], abs=1e-4)
        for task, metrics in served["tasks"].items():
            for metric, one in metrics.items():
                assert one[side] == pytest.approx(here["tasks"][task][metric][side], rel=1e-3), (task, metric, side)
    assert abs(served["sets"]["task"]["difference"]) > 0.01


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_real_server_starts_with_a_run_and_is_started_again_when_it_is_killed(tmp_path: Path) -> None:
    """The trainer computes what it samples, and of neither of its starts a process is left: not of its engine, which renames itself, either."""
    need(None if (VLLM / ".installed").exists() else "there is no vLLM: `make vllm` installs one")
    workshop, run = Workshop(tmp_path, hidden_size=128), open_store(str(tmp_path / "store")).sub("served")
    inside = [f"{name}={value}" for name, value in ENVIRONMENT.items() if name != "VLLM_ALLOW_RUNTIME_LORA_UPDATING"]
    command = ["env", *inside, str(VLLM / "bin/vllm"), "serve"]
    options = ["--enforce-eager", "--lora-target-modules", *TARGETS]
    settings = (
        *("objective.name=grpo", "rollout.reward=length", "rollout.max_tokens=3", "rollout.engine=serve"),
        *(f"rollout.serve.command={json.dumps(command)}", f"rollout.serve.options={json.dumps(options)}"),
        *("rollout.serve.gpus=0", f"tuning.targets=[{', '.join(TARGETS)}]", "model.dtype=fp32", "quant.type=none"),
        *("cluster.gpus_per_worker=0", "cluster.workers=1", "train.steps=12", "rollout.max_lag=0"),
    )

    def family() -> list[int]:
        heads = [number for number, command in sidecars(run).items() if "launcher.start.sidecars" in command]
        return [*guard.descendants(heads)]

    with Driver(tmp_path, "train", write(tmp_path, workshop, "served", *settings), real=True) as driver:
        driver.wait_for(run, 1, step=3)
        first, log = family(), run.uri.removeprefix("file://")
        (server,) = [
            number for number in first if b"/bin/vllm\0serve\0" in Path(f"/proc/{number}/cmdline").read_bytes()
        ]
        engines = [*guard.descendants([server])]
        assert len(engines) > 1, log
        os.kill(server, 9)
        until(lambda: not any(map(alive, engines)), 30)
        until(lambda: driver.log.read_text().count("server-1 answers at http://127.0.0.1:") == 2)
        last = family()
        assert driver.end() == 0, driver.log.read_text()
    assert not any(map(alive, [*first, *last]))
    steps = read_generation(run, 1)["step"]
    assert [step["step"] for step in steps] == list(range(1, 13))
    assert steps[0]["log_ratio"] < 1e-3
