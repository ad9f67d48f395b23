"""What `capstan teach` and `capstan rollout` would do, and for which runs they have nothing to do."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.data import answers
from tests.material import Workshop
from trainer.base.find.locate import resolve_base
from trainer.config import dump_config, parse_config
from trainer.errors import ConfigError
from trainer.run import layout
from trainer.run.folder import run_folder

GRPO = ("objective.name=grpo", "rollout.reward=exact", "rollout.max_tokens=8")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("asked"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["rollout.engine=[http://gpu-1:8000, http://gpu-2:8000]"], "would have http://gpu-1:8000, http://gpu-2:8000"),
        (["rollout.engine=serve"], "would have the servers that start with the run sample the answers of 10 steps of"),
    ],
)
def test_rollout_says_who_would_sample(workshop: Workshop, settings: list[str], said: str) -> None:
    config = workshop.config("sampled", *GRPO, *settings)
    run = run_folder(config)
    run.put(layout.CONFIG, dump_config(config).encode())
    assert said in answers.rollout(run, (), dry_run=True, log=print).sentence()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ([], "objective.name: sft learns from no rollouts"),
        ([*GRPO, "rollout.engine=own"], "rollout.engine: own samples in the ranks of the run"),
    ],
)
def test_a_run_that_needs_no_servers_answers_has_none_sampled(
    workshop: Workshop, settings: list[str], said: str
) -> None:
    config = workshop.config("alone", *settings)
    run = run_folder(config)
    run.put(layout.CONFIG, dump_config(config).encode())
    with pytest.raises(ConfigError, match=said):
        answers.rollout(run, (), dry_run=True, log=print)


def test_teach_says_what_a_teacher_would_write(workshop: Workshop, tmp_path: Path) -> None:
    def taught(*settings: str) -> Any:
        path = tmp_path / "run.yaml"
        path.write_text(dump_config(workshop.config("taught", *settings)))
        return answers.teach(path, (), dry_run=True, log=print)

    found = taught("objective.name=distil", f"objective.teacher={workshop.base}", "objective.top_k=4")
    assert found.dry_run
    assert (found.found["teacher"], found.found["top_k"], found.found["targets"]) == (str(workshop.base), 4, None)
    assert found.sentence().startswith(
        f"would have {workshop.base} write the 4 likeliest tokens of the targets of data"
    )
    most = taught("objective.name=distil", f"objective.teacher={workshop.base}", "objective.top_k=9999").found["top_k"]
    assert most == resolve_base(workshop.config("taught").model).architecture.vocabulary
    assert found.found["ranks"] == 1
    for settings, name in (((), "sft"), (GRPO, "grpo")):
        with pytest.raises(ConfigError, match=f"objective.name: {name} learns from no teacher"):
            taught(*settings)


def test_a_teacher_computes_in_the_type_that_the_run_has_on_this_machine(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, path = list[str](), tmp_path / "run.yaml"
    given = workshop.config("taught", "objective.name=distil", f"objective.teacher={workshop.base}")
    tree = {name: part for name, part in yaml.safe_load(dump_config(given)).items() if name != "model"}
    path.write_text(yaml.safe_dump({**tree, "model": {"base": str(workshop.base)}}))
    monkeypatch.setattr("trainer.plan.resolve.why_slow", lambda gpus: "bf16 is slow here")
    monkeypatch.setattr(answers, "build", lambda *_, **__: None)
    monkeypatch.setattr(
        answers, "run_with_bars", lambda ask, *_: asked.append(parse_config(ask.config).model.dtype) or {}
    )
    answers.teach(path, (), dry_run=False, log=print)
    assert asked == ["fp32"]


def test_what_was_judged_and_sampled_is_told_as_the_ranks_have_it(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, asked = tmp_path / "run.yaml", list[Any]()

    def ran(ask: Any, *_: Any) -> dict[str, int]:
        asked.append((ask.what, ask.overrides))
        return {"steps": 10, "made": 4}

    monkeypatch.setattr(answers, "build", lambda *_, **__: asked.append("built"))
    monkeypatch.setattr(answers, "run_with_bars", ran)
    teacher = f"objective={{name: opd, teacher: '{workshop.base}'}}"
    config = workshop.config("told", teacher, *GRPO[1:], "rollout.engine=[http://gpu-1:8000]")
    path.write_text(dump_config(config))
    run_folder(config).put(layout.CONFIG, dump_config(config).encode())
    judged = answers.teach(path, (), dry_run=False, log=print)
    assert isinstance(judged, answers.JudgedAnswers)
    assert (judged.steps, judged.made, judged.dry_run) == (10, 4, False)
    rolled = answers.rollout(run_folder(config), ("train.steps=7",), dry_run=False, log=print)
    assert (rolled.steps, rolled.made, rolled.servers) == (10, 4, ["http://gpu-1:8000"])
    assert asked == ["built", ("judge", ()), ("rollout", ("train.steps=7",))]
