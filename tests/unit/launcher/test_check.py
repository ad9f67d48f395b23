"""Settings that a start makes whole for other machines, and runs that it refuses or goes on with."""

import os
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.start.check import anchored, check, check_name
from tests.material import Workshop, commit
from trainer.config import Config, dump_config, override, parse_config
from trainer.errors import ConfigError, DataError, StorageError
from trainer.run import layout
from trainer.run.folder import run_folder
from trainer.run.owner import take
from trainer.store.store import open_store

RUN = """
run: {name: one, store: runs}
model: {base: a/b}
data: {train: [{path: rows.jsonl, weight: 2}]}
train: {steps: 1}
"""
SERVED = ("objective.name=grpo", "rollout.reward=exact", "rollout.engine=serve")
HERE = "HERE"


@pytest.mark.parametrize(
    ("settings", "name", "becomes"),
    [
        ([], "run.store", f"{HERE}/runs"),
        (["run.store=s3://b/runs"], "run.store", "s3://b/runs"),
        ([], "model.base", "a/b"),
        (["model.base=is-there"], "model.base", f"{HERE}/is-there"),
        (["sharding.deepspeed=is-there"], "sharding.deepspeed", f"{HERE}/is-there"),
        ([], "data.train", [(f"{HERE}/rows.jsonl", 2.0)]),
        (["data.train=[{path: s3://b/x, weight: 3}]"], "data.train", [("s3://b/x", 3.0)]),
        (["data.eval=[{path: x.jsonl}]"], "data.eval", [(f"{HERE}/x.jsonl", 1.0)]),
        (["eval.sets={x: {path: x.jsonl}}"], "eval.sets", {"x": f"{HERE}/x.jsonl"}),
        (["eval.bias=pairs.yaml"], "eval.bias", f"{HERE}/pairs.yaml"),
        (["eval.prompts=prompts.txt"], "eval.prompts", f"{HERE}/prompts.txt"),
        (["eval.tasks=[arc_easy, is-there]"], "eval.tasks", ["arc_easy", f"{HERE}/is-there"]),
        (["data.template=t.jinja"], "data.template", f"{HERE}/t.jinja"),
        (["data.template=chatml"], "data.template", "chatml"),
        (["data.template='{% for m in messages %}{% endfor %}'"], "data.template", "{% for m in messages %}{% endfor %}"),
        (["tuning.start=./other"], "tuning.start", f"{HERE}/other"),
        (["tuning.start=other"], "tuning.start", "other"),  # a run of the same store
        (["objective.name=distil", "objective.teacher=is-there"], "objective.teacher", f"{HERE}/is-there"),
        (["objective.name=distil", "objective.teacher=org/teacher"], "objective.teacher", "org/teacher"),
        ([*SERVED, "rollout.serve.command=[bin/vllm, serve]"], "rollout.serve.command", [f"{HERE}/bin/vllm", "serve"]),
        ([*SERVED, "rollout.serve.command=[vllm, serve]"], "rollout.serve.command", ["vllm", "serve"]),
        ([*SERVED, "rollout.serve.base=is-there"], "rollout.serve.base", f"{HERE}/is-there"),
        ([*SERVED, "rollout.reward_python=env/python"], "rollout.reward_python", f"{HERE}/env/python"),
        ([*SERVED, "rollout.reward_python=python3"], "rollout.reward_python", "python3"),
    ],
)  # fmt: skip
def test_a_path_is_whole_for_ranks_that_have_another_folder(
    settings: list[str], name: str, becomes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "is-there").write_text("")
    found: Any = anchored(parse_config(RUN, settings))
    for part in name.split("."):
        found = getattr(found, part)
    if name in ("data.train", "data.eval"):
        found = [(source.path, source.weight) for source in found]
    if name == "eval.sets":
        found = {key: given.path for key, given in found.items()}
    assert str(found) == str(becomes).replace(HERE, str(tmp_path))


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("checked"))


@pytest.fixture
def config(workshop: Workshop, tmp_path: Path) -> Config:
    return workshop.config("one", f"run.store={tmp_path}/runs")


def test_a_run_that_tries_settings_is_a_sweep(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"sweep\.settings: a single run tries no settings\. `capstan sweep`"):
        check(override(config, "sweep={settings: {optim.lr: {choice: [1.0e-3]}}}"), resume=False)


def test_a_group_that_has_the_run_is_not_checked_against_itself(config: Config) -> None:
    take(run_folder(config), "capstan train", 0, group="slurm-1.0 torchrun-a")
    check(config, resume=False, again="torchrun-a")
    for again in (None, "torchrun-b", "torchrun"):
        with pytest.raises(ConfigError, match="is in use by .*; a new run needs another name"):
            check(config, resume=False, again=again)
    with pytest.raises(ConfigError, match="--take-over goes on without it"):
        check(config, resume=True)


def test_a_checkpoint_that_is_not_whole_or_of_other_data_is_not_gone_on_with(config: Config) -> None:
    run = run_folder(config)
    run.put(layout.CONFIG, dump_config(config).encode())
    run.create(layout.manifest(2), b"{")
    with pytest.raises(StorageError, match=f"no checkpoint of {run.uri} is whole"):
        check(config, resume=True)
    commit(run, config)
    with pytest.raises(ConfigError, match="was trained on data data, the configuration's sources give"):
        check(config, resume=True)
    away = override(config, "data.train=[{path: /not/here.jsonl}]")
    with pytest.raises(DataError, match=r"/not/here\.jsonl"):
        check(away, resume=True)
    check(away, resume=True, elsewhere=True)  # the ranks see the data, and compare it


@pytest.mark.parametrize(("age", "free"), [(5.0, False), (500.0, True)])
def test_a_name_that_was_just_claimed_is_free_again_if_nothing_becomes_of_it(
    age: float, free: bool, tmp_path: Path
) -> None:
    run = open_store(str(tmp_path)).sub("one")
    run.put(layout.CONFIG, b"run: {name: one}\n")
    written = time.time() - age
    os.utime(tmp_path / "one" / layout.CONFIG, (written, written))
    if free:
        check_name(run)
        return
    with pytest.raises(ConfigError, match=r"was claimed \d+ s ago and has not begun.* free again after 120 s"):
        check_name(run)
