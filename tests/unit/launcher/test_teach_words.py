"""What `capstan teach` says of a run whose answers a teacher judges, before and after it does so."""

from pathlib import Path
from typing import Any

import pytest

from launcher.data.answers import JudgedAnswers, RolledOut, TaughtData, rollout, teach
from tests.material import Workshop
from trainer.config import dump_config
from trainer.data.dataset.manifest import read_manifest
from trainer.errors import ConfigError
from trainer.run import layout
from trainer.store.store import Store


def test_a_dry_run_says_whose_answers_would_be_judged_and_for_how_many_steps(tmp_path: Path) -> None:
    workshop, settings = Workshop(tmp_path), tmp_path / "run.yaml"
    teacher = f"objective={{name: opd, teacher: '{workshop.base}'}}"
    settings.write_text(dump_config(workshop.config("judged", teacher, "rollout.reward=exact", "rollout.max_tokens=8")))
    found = teach(settings, [], dry_run=True, log=lambda line: None)
    assert isinstance(found, JudgedAnswers)
    assert (found.steps, found.made) == (10, 0)
    assert found.sentence().startswith(f"would have {workshop.base} judge the answers of 10 steps of ")


def test_what_was_judged_says_how_many_steps_this_process_has_judged() -> None:
    found = JudgedAnswers("s3://runs/one", "bases/large", 10, 4, dry_run=False)
    assert found.sentence() == (
        "bases/large has judged the answers of 10 steps of s3://runs/one, 4 of them by this process"
    )


FOUND = {"teacher": "bases/large", "folder": "s3://runs/taught", "top_k": 16, "bytes_a_target": 98, "ranks": 4}


@pytest.mark.parametrize(
    ("found", "dry_run", "said"),
    [
        (
            {"targets": 12_345, "bytes": 2_000_000, "whole": None, "written": 0},
            False,
            "bases/large has written the 16 likeliest tokens of 12,345 targets, 2.0 MB, in s3://runs/taught",
        ),
        (
            {"targets": None, "bytes": None, "whole": None, "written": 0},
            True,
            "the 16 likeliest tokens of the targets of data that is not compiled yet, in s3://runs/taught, 98 bytes a"
            " target, by 4 ranks",
        ),
        ({"targets": 9, "bytes": 882, "whole": True, "written": 2}, True, "by 4 ranks (all of it is there)"),
        ({"targets": 9, "bytes": 882, "whole": False, "written": 2}, True, "by 4 ranks (2 blocks are there)"),
    ],
)
def test_what_a_teacher_stores_says_how_much_it_is_and_what_of_it_is_there(
    found: dict[str, Any], dry_run: bool, said: str
) -> None:
    sentence = TaughtData({**FOUND, **found}, dry_run=dry_run).sentence()
    assert sentence.endswith(said)
    assert sentence.startswith("would have bases/large write " if dry_run else "bases/large has written ")


ONLINE = ("objective.name=grpo", "rollout.reward=exact", "rollout.max_tokens=8")


def test_only_what_servers_sample_or_a_teacher_of_its_own_says_is_made_beside_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop, settings, asked = Workshop(tmp_path), tmp_path / "run.yaml", list[tuple[Any, ...]]()

    def kept(name: str, *given: str) -> Store:
        run, config = workshop.store.sub(name), dump_config(workshop.config(name, *given))
        run.put(layout.CONFIG, config.encode())
        settings.write_text(config)
        return run

    def taught(*given: str) -> Any:
        kept("taught", *given)
        return teach(settings, [], dry_run=True, log=lambda line: None)

    def rolled(run: Store, *overrides: str) -> RolledOut:
        return rollout(run, overrides, dry_run=True, log=lambda line: None)

    with pytest.raises(ConfigError, match=r"^objective.name: sft learns from no rollouts. Set it to grpo or opd\.$"):
        rolled(kept("plain"))
    with pytest.raises(ConfigError, match=r"^objective.name: sft learns from no teacher. Set it to distil or opd\.$"):
        taught()
    online = kept("online", *ONLINE)
    with pytest.raises(ConfigError, match=r"^rollout.engine: own samples in the ranks of the run"):
        rolled(online)
    found = rolled(online, "rollout.engine=['http://gpu-1:8000', 'http://gpu-2:8000']", "train.steps=7")
    assert (found.steps, found.made) == (7, 0)
    assert found.sentence() == (
        f"would have http://gpu-1:8000, http://gpu-2:8000 sample the answers of 7 steps of {online.uri}"
    )
    assert "would have the servers that start with the run sample" in rolled(online, "rollout.engine=serve").sentence()
    monkeypatch.setattr(
        "launcher.data.answers.run_with_bars", lambda *given: asked.append(given) or {"steps": 9, "made": 2}
    )
    gpus = kept("gpus", *ONLINE, "rollout.engine=['http://gpu-1:8000']", "cluster.workers=4")
    done = rollout(gpus, ["train.steps=9"], dry_run=False, log=lambda line: None)
    ((ask, alone, _),) = asked
    assert (ask.what, ask.run, ask.overrides) == ("rollout", gpus.uri, ("train.steps=9",))
    assert (alone.cluster.gpus_per_worker, done.steps, done.made) == (0, 9, 2), (
        "servers sample, and no GPU is needed here"
    )
    made = RolledOut("s3://runs/one", [], 10, 4, dry_run=False)
    assert made.sentence() == "s3://runs/one has the answers of 10 steps, 4 of them by this process"
    with pytest.raises(ConfigError, match="`capstan rollout` asks a server itself"):
        taught("objective={name: opd, teacher: 'http://gpu-1:8000'}", *ONLINE[1:])


def test_a_dry_run_says_how_much_a_teacher_would_store(tmp_path: Path) -> None:
    workshop, settings = Workshop(tmp_path), tmp_path / "run.yaml"
    config = workshop.config("taught", f"objective={{name: distil, teacher: '{workshop.base}', top_k: 4}}")
    settings.write_text(dump_config(config))
    before = teach(settings, [], dry_run=True, log=lambda line: None)
    assert isinstance(before, TaughtData)
    assert (before.found["targets"], before.found["bytes"], before.found["whole"]) == (None, None, None)
    key = workshop.prepare(config).train
    after = teach(settings, [], dry_run=True, log=lambda line: None)
    assert isinstance(after, TaughtData)
    targets = read_manifest(workshop.store, key).targets
    each = after.found["bytes_a_target"]
    assert (after.found["data"], after.found["targets"], after.found["bytes"]) == (key, targets, targets * each)
    assert (after.found["top_k"], after.found["whole"], after.found["written"]) == (4, False, 0)
    assert after.found["folder"].startswith(workshop.store.sub(layout.dataset(key)).uri.rstrip("/"))
    assert after.to_json()["dry_run"] is True
    assert before.found["bytes_a_target"] == each
