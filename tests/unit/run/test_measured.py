"""What a run measures every so many steps is shown by every tracker, the status and the report, which need to know
nothing of the action that measured it.
"""

import math
from pathlib import Path
from typing import Any

import pytest

from launcher.report.figures import read_figures
from launcher.report.page import run_page
from launcher.view.status import read_status
from launcher.view.watch import render_status
from tests.unit.run.made_records import NOW, end, start, step, write
from trainer.run.lines import PlainLines
from trainer.run.trackers import Unshown, points
from trainer.store.store import Store, open_store


def measured(at: int, **figures: Any) -> dict[str, Any]:
    return {"kind": "measured", "by": "norms", "step": at, "clock": 1.0, "time": NOW, **figures}


@pytest.fixture
def run(tmp_path: Path) -> Store:
    """Two starts, of which the second goes on from step 2."""
    run = open_store(str(tmp_path)).sub("demo")
    first = [step(number, 2.0) for number in (1, 2, 3)]
    write(run, 1, start(1), *first[:2], measured(2, largest=5.0), first[2], measured(3, largest=9.0))
    write(run, 2, start(2, step=2), step(3, 2.0), measured(3, largest=7.0, mean_norm=0.5), end("finished"))
    return run


def test_a_service_gets_the_figures_in_the_row_of_their_step() -> None:
    unshown = Unshown(-1)
    again = step(1, 1.5)  # by a start that repeats it
    for record in (measured(0, largest=1.0), step(1, 2.0), measured(1, largest=3.0), again, end("finished")):
        unshown.add(record)
    rows = [row for batch in unshown.batches(10) for row in batch]
    assert [row.step for row in rows] == [0, 1]
    assert [row.points["norms/largest"] for row in rows] == [1.0, 3.0]
    assert rows[1].points["train/loss"] == 1.5
    assert points(measured(3, largest=1.0, name="a text", many=[1])) == {"norms/largest": 1.0}


def test_the_log_has_a_line_of_them() -> None:
    assert (
        PlainLines(10).of(measured(1200, largest=5.0, mean_norm=0.25)) == "step 1,200: norms largest 5, mean norm 0.25"
    )


def test_the_status_shows_the_newest_ones(run: Store) -> None:
    status = read_status(run, clock=lambda: NOW)
    assert status.measured == {"norms": {"largest": 7.0, "mean_norm": 0.5}}
    assert ("norms", "largest 7, mean norm 0.5") in rendered(run)


def rendered(run: Store) -> list[tuple[str, str]]:
    table: Any = render_status(read_status(run, clock=lambda: NOW))
    return list(zip(*(map(str, column._cells) for column in table.columns), strict=True))


def test_the_report_draws_them_without_those_of_steps_that_were_taken_again(run: Store) -> None:
    figures = read_figures(run)
    assert figures.measured == {"norms": {"largest": [(2, 5.0), (3, 7.0)], "mean_norm": [(3, 0.5)]}}
    page = run_page(figures)
    assert "Norms: largest" in page
    assert "Norms: mean norm" in page


@pytest.mark.parametrize(
    "odd", [{"by": 3}, {"by": None}, {"step": "3"}, {"step": None}, {"largest": math.inf}, {"largest": [1]}]
)
def test_what_is_no_such_record_is_not_shown(tmp_path: Path, odd: dict[str, Any]) -> None:
    run = open_store(str(tmp_path)).sub("demo")
    write(run, 1, start(1), step(1, 2.0), measured(1, **{"largest": 5.0, **odd}), end("finished"))
    assert not any(read_status(run, clock=lambda: NOW).measured.values())
    assert not any(read_figures(run).measured.values())
