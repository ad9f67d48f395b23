"""The page of settings says what the models say. That docs/configuration.md is this page is a check of its own, of
`make check`: a new kind of something comes with its settings, and the page is written anew."""

from launcher.config_docs import render
from trainer.config import fields


def test_every_setting_has_a_row():
    page = render()
    for path, _ in fields():
        assert f"| `{path}` |" in page
    assert "| `data.train[].weight` |" in page


def test_a_row_gives_type_bounds_default_unit_and_example():
    (row,) = (line for line in render().splitlines() if line.startswith("| `data.sequence_length`"))
    assert row.split(" | ")[1:4] == ["whole number ≥ 8, ≤ 1048576", "`2048`", "tokens"]
    assert row.endswith("`8192` |")


def test_every_row_has_as_many_cells_as_the_heading():
    tables = [line for line in render().splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in tables} == {7}
