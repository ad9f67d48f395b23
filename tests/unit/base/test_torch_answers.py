"""Answers that take long: whoever waits is told what for, and they are kept for the same packages alone."""

import re
import threading
from pathlib import Path

import pytest

from trainer.base.describe import torch_answers
from trainer.base.describe.torch_answers import Question
from trainer.processes import helper_thread
from trainer.processes.helper_thread import patiently


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_FIRST_SECONDS", "_NEXT_SECONDS"):
        monkeypatch.setattr(helper_thread, name, 0.01)


def test_what_takes_long_is_said_and_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    said, enough = list[str](), threading.Event()

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 3:
            enough.set()

    with patiently("counting", say):
        assert enough.wait(10)
    assert re.fullmatch(r"counting: \d+ s so far", said[0])
    told = len(said)
    monkeypatch.setattr(helper_thread, "_FIRST_SECONDS", 5)
    with patiently("nothing", say):
        pass
    assert len(said) == told


def test_plan_says_what_it_takes_longest_for_and_how_long_so_far(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch_answers.children, "run", lambda *_, **__: threading.Event().wait(0.1) or Answered())
    question = Question("base.describe.meta", "architecture_of", {}, "base", "reading the architecture")
    assert torch_answers._answer_elsewhere(question) == 1
    said = capfd.readouterr().err.splitlines()
    assert said[0] == "reading the architecture with transformers, once for this base: this takes longest"
    assert said[1] == "reading the architecture: 0 s so far"


class Answered:
    stdout = '{"answer": 1}'


def test_an_answer_is_given_again_for_the_same_packages_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = list[str]()
    monkeypatch.setattr(torch_answers, "_answer", lambda question: asked.append("again") or len(asked))
    monkeypatch.setattr(torch_answers, "_answer_elsewhere", torch_answers._answer)
    question = Question("base.describe.meta", "architecture_of", {}, "base", "reading the architecture")
    for number, package in enumerate((None, None, "torch", "bitsandbytes", "transformers")):
        monkeypatch.setattr(torch_answers, "version", lambda name, newer=package: f"{name} {name == newer}")
        assert torch_answers.kept_answer(question, ["facts"], int) == max(1, number)
