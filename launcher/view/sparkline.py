"""A curve in one line of text."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

_BLOCKS = "▁▂▃▄▅▆▇█"
_MOST_POINTS = 120


class Thinned:
    """At most so many points of a curve, evenly spread over its steps, however long it gets."""

    def __init__(self, most: int = _MOST_POINTS) -> None:
        self.points: list[tuple[int, float]] = []
        self._most, self._every = most, 1

    def add(self, step: int, value: float | None) -> None:
        """Take a point after those before it; one that is not at a multiple of the distance is left out."""
        if value is None or step % self._every:
            return
        self.points.append((step, value))
        while len(self.points) > self._most:
            self._every *= 2
            self.points = [point for point in self.points if point[0] % self._every == 0]


def stretches(length: int, count: int) -> Iterator[tuple[int, int]]:
    """The begins and ends of `count` stretches of about the same length, which together are the whole."""
    return pairwise(length * number // count for number in range(count + 1))


def sparkline(points: Sequence[tuple[int, float]], width: int = 40) -> str:
    """The curve as blocks, lowest to highest; empty for less than two points. Where there are more points than `width`,
    each block is the mean of its own."""
    if len(points) < 2:
        return ""
    columns = min(width, len(points))
    parts = [[value for _, value in points[begin:end]] for begin, end in stretches(len(points), columns)]
    means = [sum(part) / len(part) for part in parts]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)
