"""What each verb asks a person about before it uses somebody else's run: settings that name files, data or code."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.policy.foreign import Named, check_own, evaluated_settings, exported, generated, started
from trainer.config import Config, dump_config, parse_config
from trainer.errors import ConfigError
from trainer.run import layout
from trainer.store.store import open_store

RUN = """
run: {name: theirs, store: s3://theirs/runs}
model: {base: a/b}
data: {train: [{path: s3://theirs/rows.jsonl}]}
train: {steps: 1}
"""
SERVED = ("objective.name=grpo", "rollout.reward=exact", "rollout.engine=serve")


def named(uses: Callable[[Config], Named], *settings: str) -> set[str]:
    return {name for name, value in uses(parse_config(RUN, settings)) if value}


@pytest.mark.parametrize(
    ("uses", "settings", "names"),
    [
        (evaluated_settings, ["eval.sets={x: {path: /p}}"], "eval.sets.x.path"),
        (evaluated_settings, ["eval.sets={x: {path: s3://mine/p}}"], "eval.sets.x.path"),
        (evaluated_settings, ["eval.sets={x: {path: s3://theirs/p}}"], ""),  # where the run itself is
        (evaluated_settings, ["data.eval=[{path: /p}]"], "data.eval"),
        (evaluated_settings, ["data.eval=[{path: s3://mine/p}]"], "data.eval"),
        (evaluated_settings, ["run.store=/their/runs/a", "data.eval=[{path: /their/runs/b}]"], "data.eval"),
        (evaluated_settings, ["data.train=[{path: /p}]"], ""),
        (evaluated_settings, ["data.train=[{path: /p}]", "data.held_out=0.5"], "data.train"),
        (evaluated_settings, ["eval.tasks=[arc_easy]"], "eval.tasks"),
        (evaluated_settings, ["eval.bias=/p"], "eval.bias"),
        (evaluated_settings, ["data.template=./p"], "data.template"),
        (evaluated_settings, ["data.template=chatml"], ""),
        (evaluated_settings, ["sharding.deepspeed=/p"], "sharding.deepspeed"),
        (evaluated_settings, ["quant.cache=true"], "quant.cache"),
        (generated, ["eval.prompts=/p"], "eval.prompts"),
        (generated, ["data.images.root=/p", "data.format=pictures"], "data.images.root"),
        (generated, ["data.template=/p", "quant.cache=true"], "data.template quant.cache"),
        (exported, ["data.template=file:///p"], "data.template"),
        (exported, ["quant.cache=true", "sharding.deepspeed=/p"], ""),
        *((started, [f"data.train=[{{path: {path}}}]"], "data.train") for path in ("/p", "~/p", "./p", "file:///p")),
        (started, ["data.eval=[{path: /p}]"], "data.eval"),
        (started, ["eval.sets={x: {path: /p}}", "eval.prompts=/p"], "eval.sets.x.path eval.prompts"),
        (started, ["tuning.start=./p"], "tuning.start"),
        (started, ["tuning.start=another"], ""),
        (started, ["objective.name=distil", "objective.teacher=/p"], "objective.teacher"),
        (started, ["sharding.deepspeed=/p"], "sharding.deepspeed"),
        (started, SERVED, ""),
        (started, [*SERVED, "rollout.reward=evil:reward"], "rollout.reward"),
        (started, [*SERVED, "rollout.reward_python=/p"], "rollout.reward_python"),
        (started, [*SERVED, "rollout.serve.command=[/p]"], "rollout.serve.command"),
        (started, [*SERVED, "rollout.serve.options=[--evil]"], "rollout.serve.options"),
        (started, [*SERVED, "rollout.serve.base=/p"], "rollout.serve.base"),
        (started, ["cluster.slurm={setup: [evil], extra: ['--prolog=/p']}"], "cluster.slurm.setup cluster.slurm.extra"),
        (started, ["cluster.slurm={container: [evil], python: /p}"], "cluster.slurm.container cluster.slurm.python"),
        (started, ["cluster.slurm={output: /p, local_dir: /p}"], "cluster.slurm.output cluster.slurm.local_dir"),
        (started, ["cluster.ray.runtime_env={pip: [evil]}"], "cluster.ray.runtime_env"),
    ],
)
def test_what_a_run_names_is_asked_about(uses: Callable[[Config], Named], settings: list[str], names: str) -> None:
    assert named(uses, *settings) == set(names.split())


def test_a_name_that_is_a_file_here_is_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named(started, "tuning.start=rows") == set()
    (tmp_path / "rows").write_text("")
    assert named(started, "tuning.start=rows") == {"tuning.start"}


@pytest.mark.parametrize(
    ("given", "allowed"),
    [
        ("data.eval=[]", True),
        ("data={}", True),
        ("data.ev=1", False),
        ("data.eval.x=1", False),
        ("eval.bias=/q", False),
    ],
)
def test_only_what_the_reader_names_themselves_is_allowed(
    given: str, allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    config: Config = parse_config(RUN, ["data.eval=[{path: /p}]"])
    folder = open_store(str(tmp_path / "runs")).sub("theirs")
    check_own(folder, config, evaluated_settings, [], trust=False)  # there is no run, and whoever reads it says so
    folder.put(layout.CONFIG, dump_config(config).encode())
    if allowed:
        check_own(folder, config, evaluated_settings, [given], trust=False)
        return
    with pytest.raises(ConfigError, match=r"counts as somebody else's, .*: data\.eval: .*Name your own \(data\.eval="):
        check_own(folder, config, evaluated_settings, [given], trust=False)


def test_a_run_that_was_trusted_once_is_ones_own_until_somebody_changes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    config = parse_config(RUN, ["data.eval=[{path: /p}]"])
    folder = open_store(str(tmp_path / "runs")).sub("theirs")
    folder.put(layout.CONFIG, dump_config(config).encode())
    check_own(folder, config, evaluated_settings, [], trust=True)
    check_own(folder, config, evaluated_settings, [], trust=False)
    folder.put(layout.CONFIG, dump_config(config).encode() + b"# changed\n")
    with pytest.raises(ConfigError, match="counts as somebody else's"):
        check_own(folder, config, evaluated_settings, [], trust=False)
