"""The trials of a sweep as lines over parallel axes, one for each setting and the last for the metric."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from launcher.policy.trials import word
from launcher.report.plots import Legend, Plot, tick

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 960, 320, 110, 40, 24
_MOST_TICKS = 12
_LETTER, _LINE = 9, 18
"""The room that a letter and a line of text take, with the ticks' size in page.css."""
_DECADES = 100


class Line(NamedTuple):
    """A trial: its name, its values by the names of the axes, and the class of its look."""

    name: str
    values: Mapping[str, Any]
    css: str


class _Axis(NamedTuple):
    """An axis at `x`. `places` has the height of each value, and `ticks` the values that are written."""

    name: str
    x: float
    places: Mapping[str, float]
    ticks: Sequence[tuple[float, str]]


def parallel(title: str, axes: Sequence[str], lines: Sequence[Line], logarithmic: Sequence[str] = ()) -> Plot | None:
    """Plot `lines` over `axes`. A line is left out if it lacks a value. The plot is None for less than two lines."""
    whole = [line for line in lines if all(_shown(line.values.get(name)) for name in axes)]
    if len(whole) < 2 or len(axes) < 2:
        return None
    gap = (_WIDTH - 2 * _LEFT) / (len(axes) - 1)
    drawn = [
        _axis(name, _LEFT + at * gap, [line.values[name] for line in whole], log=name in logarithmic)
        for at, name in enumerate(axes)
    ]
    paths = []
    for line in whole:
        points = "L".join(f"{axis.x:.1f} {axis.places[word(line.values[axis.name])]:.1f}" for axis in drawn)
        words = f"{line.name}: " + ", ".join(f"{name} {word(line.values[name])}" for name in axes)
        paths.append(f'<g class="series {line.css}"><path d="M{points}"><title>{escape(words)}</title></path></g>')
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}" class="chart parallel">'
        f"{''.join(_axis_svg(axis, min(gap, 2 * _LEFT)) for axis in drawn)}{''.join(paths)}</svg>"
    )
    looks = {line.css for line in whole}
    legend = [Legend(name, f"series {css}", False) for css, name in _LOOKS.items() if css in looks]
    return Plot(title, "", "", svg, legend)


BEST, PLAIN, GREY = "line color-1 best", "line color-0", "faint color-6"
_LOOKS = {BEST: "the best trial", PLAIN: "other trials", GREY: "ended early or failed"}


def _shown(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _axis(name: str, x: float, values: Sequence[Any], *, log: bool) -> _Axis:
    """Return an axis of numbers, from the lowest to the highest, or one with a place for each word."""
    span = _HEIGHT - _TOP - _BOTTOM
    if all(map(_is_number, values)):
        low, high = min(values), max(values)
        logs = low > 0 and (log or high / low >= _DECADES)

        def height(value: float) -> float:
            if low == high:
                return _TOP + span / 2
            begin, end, at = map(math.log, (low, high, value)) if logs else (low, high, value)
            return _TOP + span * (1 - (at - begin) / (end - begin))

        every = sorted(set(values))
        written = every if len(every) <= _MOST_TICKS else [low, high]
        places = {word(value): height(value) for value in every}
        return _Axis(name, x, places, _apart([(height(value), tick(value)) for value in written]))
    words = sorted({word(value) for value in values})
    places = {text: _TOP + span * (at + 0.5) / len(words) for at, text in enumerate(words)}
    return _Axis(name, x, places, _apart([(place, text[: _LEFT // _LETTER]) for text, place in places.items()]))


def _apart(ticks: Sequence[tuple[float, str]]) -> list[tuple[float, str]]:
    """Return those of `ticks` that have room beside each other."""
    found = list[tuple[float, str]]()
    for place, text in sorted(ticks):
        if not found or place - found[-1][0] >= _LINE:
            found.append((place, text))
    return found


def _axis_svg(axis: _Axis, room: float) -> str:
    ticks = "".join(
        f'<text x="{axis.x - 6:.1f}" y="{place + 4:.1f}">{escape(text)}</text>' for place, text in axis.ticks
    )
    name = escape(axis.name[-int(room / _LETTER) :])
    return (
        f'<g class="axis y"><path class="line" d="M{axis.x:.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>{ticks}</g>'
        f'<g class="axis x"><text x="{axis.x:.1f}" y="{_TOP - 18}">{name}</text></g>'
    )
