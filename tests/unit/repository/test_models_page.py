"""docs/models.md is what the tables of the tests say."""

import pytest

from tests.families import FAMILIES
from tests.models_page import PAGE, render
from tests.unit.base.test_published_models import MODELS


# `make check` asks the same of the page.
@pytest.mark.long
def test_the_page_is_current_and_has_every_family_and_every_size() -> None:
    page = render()
    assert PAGE.read_text(encoding="utf-8") == page, "run: .venv/bin/python -m tests.models_page"
    for settings in FAMILIES.values():
        assert f"| `{settings['model_type']}` |" in page
    for name in MODELS:
        assert f"| {name} |" in page


def test_every_row_has_as_many_cells_as_the_others_of_its_table() -> None:
    for table in PAGE.read_text(encoding="utf-8").split("\n\n"):
        rows = [line.replace(r"\|", "") for line in table.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) <= 1
