"""The numbers of a run's steps, as columns: a hundred thousand steps take a few megabytes, and a page a few hundred
points.
"""

import math
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from launcher.view.sparkline import stretches

Point: TypeAlias = tuple[float, float]

MOST_POINTS = 600
"""A plot is some hundred pixels wide: more points than this could not be told apart."""
_NO_MEASURE = {"kind", "step", "time", "clock"}


class Columns:
    """One column a number that steps have, in the order of the steps; a step that lacks a number has NaN there."""

    def __init__(self) -> None:
        self.steps = array("q")
        self._columns: dict[str, array[float]] = {}

    def add(self, record: dict[str, Any]) -> None:
        """Add a step's record. A number that is not finite is none, and so is a text."""
        before = len(self.steps)
        self.steps.append(record["step"])
        for name, value in record.items():
            if name in _NO_MEASURE or not _is_number(value):
                continue
            if (column := self._columns.get(name)) is None:
                column = self._columns[name] = array("d")
            if len(column) < before:
                column.extend([math.nan] * (before - len(column)))
            column.append(value)

    def cut(self, step: int) -> "Columns":
        """Take away the steps after `step`; returns what was taken, in columns of its own."""
        place, taken = bisect_right(self.steps, step), Columns()
        taken.steps = self.steps[place:]
        taken._columns = {name: column[place:] for name, column in self._columns.items()}
        del self.steps[place:]
        for column in self._columns.values():
            del column[place:]
        return taken

    @property
    def names(self) -> list[str]:
        return [name for name in self._columns if next(self.values(name), None) is not None]

    def points(self, name: str) -> Iterator[Point]:
        """(step, value) of each step that has this number."""
        column = self._columns.get(name, ())
        return ((step, value) for step, value in zip(self.steps, column, strict=False) if not math.isnan(value))

    def values(self, name: str) -> Iterator[float]:
        return (value for _, value in self.points(name))

    def sum(self, name: str) -> float:
        return math.fsum(self.values(name))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def finite_points(points: Sequence[tuple[Any, Any]]) -> list[Point]:
    """Those of `points` that can be drawn."""
    return [(x, y) for x, y in points if _is_number(x) and _is_number(y)]


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` of `points`, in their order: the first, the last, and of each stretch the lowest and the
    highest.
    """
    if len(points) <= most:
        return list(points)
    kept = {0, len(points) - 1}
    for begin, end in stretches(len(points), most // 2 - 1):
        stretch = range(begin, end)
        kept |= {min(stretch, key=lambda at: points[at][1]), max(stretch, key=lambda at: points[at][1])}
    return [points[at] for at in sorted(kept)]


def means(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """The mean of each stretch of `points`, at the stretch's last x; empty where there are few enough to show them
    all.
    """
    if len(points) <= most:
        return []
    return [
        (points[end - 1][0], math.fsum(y for _, y in points[begin:end]) / (end - begin))
        for begin, end in stretches(len(points), most // 4)
    ]
