"""docs/configuration.md is what the models say."""

from launcher.config_docs import PAGE, render
from trainer.config import fields


def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == render(), "run: .venv/bin/python -m launcher.config_docs"


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
