"""What `capstan teach` says of a run whose answers a teacher judges, before and after it does so."""

from pathlib import Path
from typing import Any

import pytest

from launcher.data.answers import JudgedAnswers, TaughtData, teach
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
