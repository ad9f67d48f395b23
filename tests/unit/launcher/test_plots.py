"""Lines over several axes: each axis has its values in order, from the lowest number at the bottom to the highest."""

import re

import pytest

from launcher.report.plots import BEST, GREY, PLAIN, Line, parallel, tick


def heights(svg: str) -> list[list[float]]:
    """The heights of each line on its axes."""
    paths = re.findall(r'<g class="series [^"]*"><path d="M([^"]*)">', svg)
    return [[float(point.split()[1]) for point in path.split("L")] for path in paths]


def test_words_have_places_of_their_own_and_equal_numbers_the_middle() -> None:
    lines = [
        Line("one", {"method": "lora", "rank": 8, "lr": 1.0, "wide": 1}, BEST),
        Line("two", {"method": "dora", "rank": 8, "lr": 100.0, "wide": 1000}, PLAIN),
        Line("three", {"method": "lora", "rank": 8, "lr": 10.0, "wide": 10}, PLAIN),
        Line("lacking", {"method": "lora", "rank": None, "lr": 10.0, "wide": 10}, GREY),
        Line("endless", {"method": "lora", "rank": 8, "lr": float("nan"), "wide": 10}, GREY),
    ]
    plot = parallel("trials", ["method", "rank", "lr", "wide"], lines, logarithmic=["lr"])
    assert plot is not None
    one, two, three = heights(plot.svg)
    assert one[0] == three[0]
    span = 2 * (one[0] - two[0])  # words are in the order of the alphabet, a half of the axis for each
    assert span > 100
    assert one[1] == two[1] == three[1] == pytest.approx((one[0] + two[0]) / 2, abs=0.1)
    for axis, share in ((2, 1 / 2), (3, 1 / 3)):  # a wide range of positive numbers is logarithmic too
        assert one[axis] - two[axis] == pytest.approx(span, abs=0.2)
        assert one[axis] - three[axis] == pytest.approx(share * span, abs=0.2)
    assert [entry.name for entry in plot.legend] == ["the best trial", "other trials"]
    assert ">lora</text>" in plot.svg
    assert "one: method lora, rank 8, lr 1" in plot.svg


def test_one_line_or_one_axis_is_no_plot() -> None:
    lines = [Line(name, {"a": 1, "b": 2}, PLAIN) for name in ("one", "two")]
    assert parallel("trials", ["a"], lines) is None
    assert parallel("trials", ["a", "b"], lines[:1]) is None
    assert parallel("trials", ["a", "b"], lines) is not None


@pytest.mark.parametrize(
    ("value", "words"),
    [(9999, "9999"), (10_000, "10k"), (2.5e6, "2.5M"), (3e9, "3G"), (4e12, "4T"), (1e-3, "0.001"), (2e-4, "2e-4"), (0, "0"), (-20_000, "-20k")],
)  # fmt: skip
def test_a_number_on_an_axis_is_short(value: float, words: str) -> None:
    assert tick(value) == words
