"""What `capstan teach` says of a run whose answers a teacher judges, before and after it does so."""

from pathlib import Path

from launcher.data.answers import JudgedAnswers, teach
from tests.material import Workshop
from trainer.config import dump_config


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
