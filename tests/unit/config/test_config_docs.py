"""The page of settings says what the models say. That docs/configuration.md is this page is a check of its own, of
`make check`: a new kind of something comes with its settings, and the page is written anew."""

import sys
from pathlib import Path

import pytest

from launcher.config_docs import PAGE, render, write_or_check
from trainer.config import fields
from trainer.tuning.method import methods


def test_every_setting_has_a_row():
    page = render()
    for path, _ in fields():
        assert f"| `{path}` |" in page
    assert "| `data.train[].weight` |" in page


def test_a_row_gives_type_bounds_default_unit_and_example():
    (row,) = (line for line in render().splitlines() if line.startswith("| `data.sequence_length`"))
    assert row.split(" | ")[1:4] == ["whole number ≥ 8, ≤ 1048576", "`2048`", "tokens"]
    assert row.endswith("`8192` |")


def test_bounds_defaults_units_and_examples_are_those_of_the_page_that_users_read():
    """Words are compared by `make check`, as a new kind of something comes with words of its own."""

    def facts(page: str) -> dict[str, list[str]]:
        rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
        return {
            name: ["kinds" if "`" in type else type, *more, row[-1]] for row in rows for name, type, *more in [row[:4]]
        }

    told, found = facts(PAGE.read_text(encoding="utf-8")), facts(render())
    assert len(told) > 200
    assert {name: found[name] for name in told} == told


def test_every_row_has_as_many_cells_as_the_heading():
    tables = [line for line in render().splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in tables} == {7}


def test_a_row_names_the_kinds_that_a_setting_takes_and_those_that_read_it():
    rows = {line.split("`")[1]: line for line in render().splitlines() if line.startswith("| `")}
    assert all(f"`{name}`" in rows["tuning.method"] for name in methods())
    assert "oft: learnt rotations of a layer's inputs." in rows["tuning.method"]
    assert "Read by oft." in rows["tuning.block"]
    assert "Read by adafactor" not in rows["optim.eps"]
    assert "Read by adam, adamw, adamw_8bit, muon." in rows["optim.eps"]


def test_a_page_is_written_and_fails_the_check_where_it_is_missing_or_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()

    def run(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["page", *words])
        return write_or_check(page, lambda: "≥ 1\n", "launcher.page", "a table")

    assert run("--check") == 1
    assert capsys.readouterr().err == "docs/page.md is out of date. Run: .venv/bin/python -m launcher.page\n"
    assert (run(), page.read_text(encoding="utf-8"), run("--check")) == (0, "≥ 1\n", 0)
    page.write_text("older\n")
    assert (run("--check"), page.read_text()) == (1, "older\n")
