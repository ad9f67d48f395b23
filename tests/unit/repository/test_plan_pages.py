"""The walk-throughs print what `capstan plan` prints, and what they say beside it is so."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.pages import ROOT, blocks_of
from tests.plan_pages import PAGES, render
from tests.unit.repository.test_examples import LLAMA_8B, LLAMA_70B, LLAMA_405B
from trainer.base.describe.description import describe
from trainer.config import parse_config
from trainer.plan.plan import Plan, make_plan


def page(name: str) -> Path:
    return ROOT / "docs" / f"{name}.md"


def plan(name: str, gib: int, *overrides: str) -> Plan:
    (shown,) = (block.text for block in blocks_of(page(name)) if block.language == "yaml")
    config = parse_config(shown, overrides)
    _, base = PAGES[f"docs/{name}.md"]
    return make_plan(config, describe(base, None), config.cluster.most_workers or 1, 8, gib * 2**30)


@pytest.mark.parametrize("name", PAGES)
def test_the_figures_of_a_page_are_those_that_plan_prints(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert text == render(name), "run: .venv/bin/python -m tests.plan_pages"
    assert re.search(r"^memory +fits: ", text, re.MULTILINE)


def test_figures_that_are_out_of_date_are_written_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.plan_pages._printed", lambda command, *_: f"{command.split()[1]} in figures\n")
    assert "```text\n70b.yaml in figures\n```" in render("docs/walkthrough-70b.md")


def test_what_the_pages_say_of_other_gpus_and_batches() -> None:
    assert [plan("walkthrough-70b", gib).shortfalls != [] for gib in (80, 40, 23)] == [False, False, True]
    assert plan("walkthrough-70b", 23, "data.sequence_length=4096").shortfalls == []
    rows, single = (plan("walkthrough-moe", 80, *more).traffic_per_step for more in ((), ("train.micro_batch=1",)))
    assert rows.base_gathers * 4 == single.base_gathers
    linear = plan("walkthrough-moe", 80).parameters
    assert 0.96 < 1 - 6.7e9 / linear.frozen < 0.98


@pytest.mark.parametrize(
    ("base", "gpus", "gib", "fits"),
    [
        (LLAMA_8B, 1, 24, True),
        (LLAMA_70B, 1, 80, True),
        (LLAMA_70B, 4, 24, True),
        (LLAMA_70B, 2, 24, False),
        (LLAMA_405B, 8, 80, True),
        (LLAMA_405B, 2, 80, False),
    ],
)
def test_what_the_questions_say_fits_does(base: dict[str, Any], gpus: int, gib: int, fits: bool) -> None:
    text = " ".join(page("faq").read_text(encoding="utf-8").split())
    first = "8B fits on one GPU of 24 GB, and 405B on eight GPUs of 80 GB each."
    assert f"{first} 70B fits on one GPU of 80 GB, or on four of 24 GB each." in text
    config = parse_config(
        "run: {name: a}\nmodel: {base: b}\nquant: {double: true}\ndata: {train: [{path: c}]}\ntrain: {steps: 1}"
    )
    assert (make_plan(config, describe(base, None), gpus, gpus, gib * 2**30).shortfalls == []) is fits
