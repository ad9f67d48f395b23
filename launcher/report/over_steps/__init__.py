"""The protocol of a figure over the steps: what it reads of a run's history, and how it is called."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from launcher.report.history import History, Point


@dataclass(frozen=True)
class Figure:
    """A figure. `read` returns the points (step, value) of each of its lines by name; no points, no figure."""

    title: str
    unit: str
    read: Callable[[History], Mapping[str, Sequence[Point]]]
