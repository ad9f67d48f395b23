"""A reward that cannot be found is refused where the run starts, and is a word of warning where it may be found."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.cluster.ray import jobs
from launcher.cluster.slurm import queue
from launcher.cluster.slurm import submit as by_slurm
from launcher.data import answers
from launcher.drive import local, sweep
from launcher.plan import notes
from trainer.config import Config, dump_config, override, parse_config
from trainer.errors import ConfigError
from trainer.run import layout
from trainer.run.folder import run_folder

MISSING = "rollout.reward: mine:most is not found on .*: there is no module 'mine' in"
RUN = """
run: {name: job, store: runs}
model: {base: /m, dtype: fp32}
data: {train: [{path: d}]}
train: {steps: 2, global_batch: 4}
objective: {name: grpo}
rollout: {reward: "mine:most"}
cluster: {workers: 1, gpus_per_worker: 0}
"""
Say = Callable[[str], None]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run whose other settings nobody checks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(
        "sys.meta_path", [*sys.meta_path, SimpleNamespace(find_module=lambda *_: None)]
    )  # as pygal does
    for module in (queue, by_slurm):
        monkeypatch.setattr(module, "call", lambda *_, **__: subprocess.CompletedProcess((), 0, '{"jobs": []}', ""))
    config = parse_config(RUN)
    for module in (jobs, local, sweep):
        monkeypatch.setattr(module, "check", lambda config, **_: SimpleNamespace(config=config, base=None))
    for module in (jobs, by_slurm):
        monkeypatch.setattr(module, "checked", lambda config, **_: (config, True))
        monkeypatch.setattr(module.snapshot, "take", lambda folder: jobs.snapshot.Snapshot())
    for module in (jobs, local):
        monkeypatch.setattr(module, "with_found", lambda config, resolved: config)
    monkeypatch.setattr(by_slurm, "_memory", lambda config: ())
    monkeypatch.setattr(sweep, "base_facts", lambda base: None)
    monkeypatch.setattr(sweep, "_sharing_base", lambda config: config)
    return config


def train(config: Config, log: Say) -> Any:
    return local.checked_here(config, resume=False, take_over=False, log=log)


def try_settings(config: Config, log: Say) -> Any:
    return sweep.laid_out(override(config, "sweep={settings: {optim.lr: {grid: [1.0e-3]}}}"), resume=False)


def submit_here(config: Config, log: Say) -> Any:
    return jobs.submit(config, resume=False, take_over=False, dry_run=True, log=log)


def to_slurm(config: Config, log: Say, **slurm: str) -> Any:
    how = {"resume": False, "take_over": False, "after": None, "dry_run": True, "log": log}
    given = "".join(f", {name}: {value}" for name, value in slurm.items())
    return by_slurm.submit(override(config, f"cluster.slurm={{nodes: 1, launch: direct{given}}}"), **how)


def rollout(config: Config, log: Say) -> Any:
    run = run_folder(config).sub("asked")
    run.put(layout.CONFIG, dump_config(override(config, "rollout.engine=serve")).encode())
    return answers.rollout(run, (), dry_run=True, log=log)


@pytest.mark.parametrize("start", [train, try_settings, submit_here, to_slurm, rollout])
def test_a_start_that_would_run_the_reward_from_here_misses_it(
    start: Callable[[Config, Say], Any], config: Config, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=MISSING):
        start(config, print)
    (tmp_path / "mine.py").write_text("def most(completions): ...\n")
    start(config, print)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("python", "/opt/python"), ("container", "[a]"), ("setup", "[module load x]"), ("extra", "[--chdir=/x]")],
)
def test_a_job_of_slurm_may_find_what_is_not_here(setting: str, value: str, config: Config) -> None:
    said = list[str]()
    to_slurm(config, said.append, **{setting: value})
    assert any(line.startswith("Attention: not known from here whether the job finds the reward") for line in said)


def test_a_job_of_ray_takes_what_git_tracks_in_the_top_folder(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "check_shared", lambda *_: None)
    on_ray = override(config, "cluster.ray.address='http://127.0.0.1:8265'")
    try_settings(on_ray, print)  # another machine runs the trials

    def doubts() -> list[str]:
        said = list[str]()
        jobs.submit(on_ray, resume=False, take_over=False, dry_run=True, log=said.append)
        return [line for line in said if line.startswith("Attention: rollout.reward: mine:most: the job starts in")]

    (tmp_path / "mine.py").write_text("def most(completions): ...\n")
    assert len(doubts()) == 1, "no git has it"
    file = jobs.snapshot._File(jobs.snapshot.tarfile.TarInfo("code/mine.py"), b"")
    kept = jobs.snapshot.Snapshot(tmp_path, [file], jobs.snapshot.GitState(None, None, None, False, []))
    monkeypatch.setattr(jobs.snapshot, "take", lambda folder: kept)
    assert doubts() == []
    of_package = override(on_ray, "rollout.reward=mine.deep:most")
    assert jobs._reward_left_behind(of_package, kept) is None, "what is within it comes with it"
    monkeypatch.setattr(jobs.snapshot, "take", lambda folder: jobs.snapshot.Snapshot())
    own = override(on_ray, "rollout.reward_python=/opt/python")
    assert jobs._reward_left_behind(own, jobs.snapshot.Snapshot()) is None, "that Python has it or not"
    on_ray = override(on_ray, "rollout.reward=json:loads")
    assert doubts() == [], "a package of this Python may be one of theirs"


def test_a_plan_tells_of_a_reward_that_is_not_here(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_of_large_batch", "_of_rollouts"):
        monkeypatch.setattr(notes, name, lambda *_: None)
    model: Any = SimpleNamespace(kept_of_pictures=None)
    known: Any = (None, None, None, None, None)

    def told() -> list[str]:
        return [*filter(None, notes.notes_of(config, model, model, known, 1))]

    (note,) = told()
    assert note.endswith("A start from another place may find it.")
    (tmp_path / "mine.py").write_text("def most(completions): ...\n")
    assert told() == []
