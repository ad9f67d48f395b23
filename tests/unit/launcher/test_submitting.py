"""What `capstan submit` leaves in a run's folder, and what it gives to Slurm, to a Ray cluster or to a process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.cluster.ray import jobs
from launcher.cluster.slurm import queue
from launcher.cluster.slurm import submit as by_slurm
from launcher.start import check
from tests.material import Workshop, commit
from trainer.base.find.locate import resolve_base
from trainer.config import Config, override
from trainer.data.compile.prepare import locate
from trainer.errors import ConfigError
from trainer.run import layout
from trainer.run.folder import run_folder, submitted_config
from trainer.run.owner import Ownership, read_owner

ON_CPUS = ("cluster.workers=1", "cluster.gpus_per_worker=0")
RUNNING = {
    "job_id": 13,
    "job_state": ["RUNNING"],
    "state_reason": "None",
    "start_time": 7,
    "nodes": "",
    "restart_cnt": 0,
}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("submitting"))


@pytest.fixture
def config(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    return workshop.config("job", f"run.store={tmp_path}/runs", *ON_CPUS)


class Slurm:
    """Answers sbatch with these lines in turn, of which one that begins with `error` refuses."""

    def __init__(self, *answers: str) -> None:
        self.answers = iter(answers)
        self.calls = list[tuple[str, ...]]()
        self.given = list[tuple[str, dict[str, str]]]()
        self.jobs = list[dict[str, Any]]()

    def __call__(
        self, *command: str, given: str | None = None, environment: Any = None
    ) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        said = json.dumps({"jobs": self.jobs}) if command[0] == "squeue" else ""
        if command[0] == "sbatch":
            self.given.append((given or "", environment))
            said = next(self.answers)
        refused = said.startswith("error")
        return subprocess.CompletedProcess(command, int(refused), "" if refused else said, f"sbatch: {said}")


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    fake = Slurm("12;cluster\n", "13\n", "14\n")
    for module in (queue, by_slurm):
        monkeypatch.setattr(module, "call", fake)
    return fake


def to_slurm(config: Config, **how: Any) -> by_slurm.SlurmSubmission:
    given: dict[str, Any] = {"resume": False, "take_over": False, "after": None, "dry_run": False, "log": print} | how
    return by_slurm.submit(config, **given)


def test_slurm_gets_the_batch_file_that_the_run_keeps(
    config: Config, slurm: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SRUN_DEBUG", "3")
    of_job = f"cluster.slurm={{nodes: 1, launch: direct, chain: 2, output: '{tmp_path}/50%j#1'}}"
    done = to_slurm(override(config, of_job))
    run = run_folder(config)
    assert done.jobs == [12, 13]
    assert done.text().startswith("run job: submitted to Slurm as jobs 12, 13\n")
    assert [text for text, _ in slurm.given] == [run.get(layout.SLURM_SCRIPT).decode()] * 2
    assert f'#SBATCH --output="{tmp_path}/50%%j#1/slurm-%j.out"\n' in slurm.given[0][0]
    assert "SRUN_DEBUG" not in slurm.given[0][1]
    assert "PATH" in slurm.given[0][1]
    owner, record = read_owner(run), json.loads(run.get(layout.SLURM_JOB))
    assert owner is not None
    assert record == {
        "jobs": [12, 13],
        "submission": owner.group,
        "output": f"{tmp_path}/50%j#1/slurm-%j.out",
        "run": run.uri,
    }
    assert f"SUBMISSION={owner.group}\n" in slurm.given[0][0]
    assert (tmp_path / "50%j#1").is_dir()
    assert submitted_config(run).retry.preemptions == 0, "a job ends when it loses its machine"
    beside = ["run.name=next", "cluster.slurm={nodes: 1, launch: direct}", f"run.store='{tmp_path}/runs#1'"]
    waits = to_slurm(override(config, *beside), after=run.uri)
    assert waits.jobs == [14]
    assert waits.output == f"{tmp_path}/runs#1/next/slurm-%j.out"
    assert "#SBATCH --dependency=afterok:13\n" in slurm.given[2][0]
    slurm.jobs = [RUNNING]
    with pytest.raises(ConfigError, match="job 13 of .* is RUNNING"):
        to_slurm(override(config, of_job), take_over=True)


def test_a_chain_that_slurm_refuses_leaves_no_job_and_frees_the_name(config: Config, slurm: Slurm) -> None:
    slurm.answers = iter(["12\n", "error: no such partition"])
    with pytest.raises(ConfigError, match=r"^Slurm refuses the job: no such partition$"):
        to_slurm(override(config, "cluster.slurm={nodes: 1, launch: direct, chain: 2}"))
    assert slurm.calls[-1] == ("scancel", "12")
    run = run_folder(config)
    assert read_owner(run) is None
    assert not run.exists(layout.CONFIG)
    assert not run.exists(layout.SLURM_JOB)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["cluster.slurm={nodes: 1, chain: 2}", "retry.slow_rank=replace"], "retry.slow_rank: replace is not possible"),
        (["cluster.slurm={nodes: 2}", "cluster.workers=16", "train.global_batch=1"], "a step computes 16 rows"),
    ],
)
def test_what_slurm_would_train_in_vain_is_not_submitted(
    config: Config, slurm: Slurm, settings: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        to_slurm(override(config, "cluster.slurm.launch=direct", *settings))
    assert slurm.calls == []


def test_a_dry_run_says_what_of_the_job_may_be_wrong(config: Config, slurm: Slurm) -> None:
    def doubts(memory: str) -> str:
        said = list[str]()
        job = f"cluster.slurm={{nodes: 1, launch: direct, cpus_per_node: 2, python: /opt/python{memory}}}"
        to_slurm(override(config, job), dry_run=True, log=said.append)
        return " | ".join(said)

    assert "memory_per_node is not set: the job gets the partition's default" in doubts("")
    too_little = "Attention: cluster.slurm.memory_per_node: "
    sizes = ("'0'", "1K", "900G")  # 0 is all of a node's memory
    assert [too_little in doubts(f", memory_per_node: {size}") for size in sizes] == [False, True, False]


def test_a_dry_run_gives_slurm_nothing_and_takes_no_name(config: Config, slurm: Slurm) -> None:
    done = to_slurm(override(config, "cluster.slurm={nodes: 1, launch: direct}"), dry_run=True)
    assert done.text().startswith("#!/bin/bash\n")
    assert slurm.calls == []
    assert not run_folder(config).exists(layout.CONFIG)


def to_ray(config: Config, **how: Any) -> jobs.RaySubmission:
    given: dict[str, Any] = {"resume": False, "take_over": False, "dry_run": False, "log": print} | how
    return jobs.submit(config, **given)


def test_without_a_cluster_the_driver_is_a_process_here(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    started = list[list[str]]()

    def start(command: list[str], owner: Ownership) -> str:
        started.append(command)
        assert owner.run.exists(layout.SNAPSHOT), "the code is kept before the driver starts"
        return "process 7"

    monkeypatch.setattr(jobs, "_start_process", start)
    run = run_folder(config)
    planned = to_ray(override(config, "cluster.ray.runtime_env={env_vars: {A: b}}"), dry_run=True)
    assert (planned.job, planned.runtime_env) == (None, {}), "no cluster is told of it"
    assert "would be submitted to a Ray of its own on this machine\n" in planned.text()
    assert (started, run.exists(layout.CONFIG)) == ([], False)
    done = to_ray(config)
    owner = read_owner(run)
    assert owner is not None
    assert done.job == "process 7"
    assert done.text().startswith("run job: submitted to a Ray of its own on this machine as process 7\n")
    driver = [sys.executable, "-m", "launcher.drive.driver", run.uri, "--submission"]
    assert started == [[*driver, owner.group]]
    assert done.config["train"] == {"steps": 10, "global_batch": 4}, "what differs from the defaults"
    commit(run, config)
    with pytest.raises(ConfigError, match="was trained on data data, the configuration's sources give"):
        to_ray(config, resume=True, take_over=True)
    commit(run, config, step=8, dataset=locate(config, resolve_base(config.model))["train"])
    to_ray(config, resume=True, take_over=True)
    assert started[1][:5] == driver
    assert started[1][6:] == ["--resume"]
    wide = override(config, "cluster.workers=20")
    with pytest.raises(ConfigError, match="a step computes 20 rows"):
        to_ray(override(wide, "run.name=other"))
    to_ray(wide, resume=True, take_over=True)  # it may have lost machines since it began, and have them again
    for setting, name in (("retry.slow_rank=replace", "retry.slow_rank"), ("cluster.spares=1", "cluster.spares")):
        asked = override(config, "run.name=other", "cluster.keeper=true", setting)
        with pytest.raises(ConfigError, match=f"{name}: .*without a cluster all ranks are on this machine"):
            to_ray(asked)


def test_a_cluster_gets_the_code_and_the_command_of_the_driver(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = dict[str, Any]()

    class Client:
        def submit_job(self, **given: Any) -> str:
            asked.update(given)
            asked["code"] = os.listdir(given["runtime_env"]["working_dir"])
            return "raysubmit_1"

    (tmp_path / "reward.py").write_text("def reward(): ...\n")
    subprocess.run(["git", "init", "-q"], check=True, timeout=30)
    subprocess.run(["git", "add", "reward.py"], check=True, timeout=30)
    monkeypatch.setattr(jobs, "_client", lambda address: Client())
    on_ray = override(config, "cluster.ray={address: 'http://127.0.0.1:8265', runtime_env: {env_vars: {A: b}}}")
    done = to_ray(on_ray)
    run = run_folder(config)
    assert done.job == "raysubmit_1"
    assert done.text().startswith("run job: submitted to the Ray cluster at http://127.0.0.1:8265 as raysubmit_1\n")
    assert asked["entrypoint"].startswith(f"python -m launcher.drive.driver {run.uri} --submission ")
    assert asked["entrypoint"].endswith(" --address auto")
    assert asked["runtime_env"]["env_vars"] == {"A": "b"}
    assert asked["code"] == ["reward.py"]
    assert asked["metadata"] == {"capstan_run": run.uri}
    named = override(on_ray, "run.name=other")
    with pytest.raises(ConfigError, match=r"cluster\.spares: 1 is not possible without cluster\.workers"):
        to_ray(override(named, "cluster.workers=null", "cluster.spares=1", "cluster.keeper=true"))
    with pytest.raises(ConfigError, match="a step computes 16 rows"):
        to_ray(override(named, "cluster.workers=16", "train.global_batch=1"))
    monkeypatch.setattr(check, "file_system", lambda folder: "ext4")
    with pytest.raises(ConfigError, match=r"run\.store: .* is on a disk of this machine"):
        to_ray(override(named, "cluster.ray.address='http://198.51.100.7:8265'"))
