"""Plots as SVG: pygal finds the scales and draws, and the page's style sheet decides all colours and fonts.

A plot works wherever its SVG is put into a page: it has no script, no style, no identifier and no link of its own. Its
only texts are ticks. Title, unit and legend are words of the page (`Plot`), which flow on a phone.

The trials of a sweep are lines over parallel axes, one for each setting and the last for the metric.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from html import escape
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

from launcher.policy.trials import word
from launcher.report.history import Point, finite_points

_SVG = "http://www.w3.org/2000/svg"
_PLACES = {"d", "x", "y", "cx", "cy"}
_LONG = re.compile(r"(\d\.\d)\d+")
_NOT_SHOWN = {"defs", "desc", "title", "titles", "background", "plot tooltip-overlay", "plot text-overlay"}
_FONT, _WIDE_FONT = 14, 12
"""Sizes of the ticks' texts in page.css: pygal leaves room for them."""
_TICKS = 6
_ROOM = 0.05
_FEW = 60
"""A line of so few points shows each of them."""
SERIES_COLORS = 7
"""Lines of a plot that have colours of their own; further ones begin again, dashed."""

Look = Literal["line", "faint", "dots", "dashed", "restart", "commit", "evaluation", "lost"]
_MARKS = ("dots", "commit", "evaluation", "lost")


@dataclass(frozen=True)
class Series:
    """Points (x, y) under a name, and their look: a line, a faint line beside its mean, dots, dashes, or marks.

    `words` are those of each mark. Without them a mark has its name and its place.
    """

    name: str
    points: Sequence[Point]
    look: Look = "line"
    words: Sequence[str] = ()


@dataclass(frozen=True)
class Events:
    """Events of a run by their steps, each with its words, which name it on a plot.

    `restarts` are upright lines with short labels above: (label, words). The others are marks.
    """

    restarts: Mapping[float, tuple[str, str]] = field(default_factory=dict[float, tuple[str, str]])
    commits: Mapping[float, str] = field(default_factory=dict[float, str])
    evaluations: Mapping[float, str] = field(default_factory=dict[float, str])
    lost: Mapping[float, str] = field(default_factory=dict[float, str])

    def drawn(self, low: float, high: float) -> list[Series]:
        """Return the marks: commits at the lower end of a plot, the others at the upper one."""
        upright = [point for at in self.restarts for point in ((at, low), (at, high), (at, math.nan))]
        every = [
            Series("restart", upright, "restart"),
            Series("commit", [(at, low) for at in self.commits], "commit", list(self.commits.values())),
            Series(
                "evaluation", [(at, high) for at in self.evaluations], "evaluation", list(self.evaluations.values())
            ),
            Series("ranks lost", [(at, high) for at in self.lost], "lost", list(self.lost.values())),
        ]
        return [one for one in every if one.points]


@dataclass(frozen=True)
class Legend:
    """An entry of a plot's legend. Its class has the colour and the look, and it is a mark or a line."""

    name: str
    css: str
    marks: bool


@dataclass(frozen=True)
class Plot:
    """A drawn plot. `svg` is ready for the page, and the page has to escape everything else."""

    title: str
    unit: str
    x: str
    svg: str
    legend: list[Legend] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Axis:
    """The x axis. On a logarithmic axis every x is above 0. `ticks` are given, or stand at round numbers."""

    name: str = "step"
    log: bool = False
    ticks: Sequence[float] = ()

    def place(self, x: float) -> float:
        return math.log10(x) if self.log else float(x)

    def label(self, place: float) -> str:
        return tick(10**place if self.log else place)


STEPS = Axis()


def lines(
    title: str,
    series: Sequence[Series],
    *,
    unit: str,
    x: Axis = STEPS,
    events: Events | None = None,
    wide: bool = False,
    note: str = "",
) -> Plot | None:
    """Plot series over the same x, with the events on them. The result is None if there is no point to draw."""
    drawn = [Series(one.name, points, one.look) for one in series if (points := finite_points(one.points))]
    if not drawn:
        return None
    low, high = _bounds([y for one in drawn for _, y in one.points])
    events = events or Events()
    every = [*drawn, *events.drawn(low, high)]
    svg = _drawn(title, every, low, high, x=x, wide=wide, names=list(events.restarts.values()))
    legend = [Legend(one.name, _css(every, at), one.look in _MARKS) for at, one in enumerate(every)]
    return Plot(title, unit, x.name, svg, legend, note)


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and the highest of `values`, with a distance between them."""
    low, high = min(values), max(values)
    return (low, high) if low < high else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)


def _wider(low: float, high: float, room: float) -> tuple[float, float]:
    """Return an axis from `low` to `high` with `room`, a share of its length, at both ends."""
    return low - room * (high - low), high + room * (high - low)


def _drawn(
    title: str,
    series: Sequence[Series],
    low: float,
    high: float,
    *,
    x: Axis,
    wide: bool,
    names: Sequence[tuple[str, str]],
) -> str:
    import pygal  # takes a tenth of a second
    from pygal.style import Style

    every = [at for one in series for at, _ in one.points]
    begin = 0 if not x.log and 0 < min(every) <= max(every) / 10 else min(every)
    # Lines begin on the axes. Dots alone keep a distance from them.
    room = _ROOM if any(one.look == "dots" for one in series) else 0.0
    chart = pygal.XY(
        width=960 if wide else 480,
        height=360 if wide else 270,
        margin=6,
        margin_top=18,
        margin_right=20,
        show_legend=False,
        style=Style(label_font_size=_WIDE_FONT if wide else _FONT),
        max_scale=_TICKS,
        truncate_label=-1,  # a number without its end is another number
        range=_wider(low, high, room),
        xrange=_wider(*_bounds([x.place(begin), x.place(max(every))]), room),
        x_labels=[*map(x.place, x.ticks or _log_ticks(begin, max(every)))] if x.ticks or x.log else None,
        value_formatter=partial(tick, digits=_digits(low, high)),
        x_value_formatter=x.label,
        js=(),
        css=(),
    )
    for one in series:
        # pygal takes None for a gap in the line.
        points = [(x.place(at), None if math.isnan(y) else y) for at, y in one.points]
        dots = one.look in _MARKS or (one.look == "line" and len(points) <= _FEW)
        stroke = one.look not in _MARKS
        chart.add(
            one.name,
            points,
            stroke=stroke,
            show_dots=dots,
            dots_size=4 if one.look == "dots" else 2.5,
            allow_interruptions=True,
        )
    return _tidied(chart.render(is_unicode=True, disable_xml_declaration=True), title, series, names)


def _tidied(svg: str, title: str, series: Sequence[Series], names: Sequence[tuple[str, str]]) -> str:
    """Return the SVG without pygal's style, script, tooltips and background.

    Its dots have titles, which browsers show and screen readers say.
    """
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(svg)
    root.attrib = {"viewBox": root.get("viewBox", ""), "role": "img", "aria-label": title, "class": "chart"}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.removeprefix(f"{{{_SVG}}}") in _NOT_SHOWN or child.get("class") in _NOT_SHOWN:
                parent.remove(child)
    for node in list(root.iter()):
        if match := re.match(r"series serie-(\d+)", node.get("class") or ""):
            one = series[int(match[1])]
            node.set("class", _css(series, int(match[1])))
            for number, (circle, (x, y)) in enumerate(zip(node.iter(f"{{{_SVG}}}circle"), one.points, strict=False)):
                words = one.words[number] if one.words else f"{one.name}: {y:.6g} at {x:g}"
                ElementTree.SubElement(circle, "title").text = words
            if one.look == "restart":
                _name_lines(node, names)
        for name in _PLACES.intersection(node.keys()):
            node.set(name, _LONG.sub(r"\1", node.attrib[name]))
    return ElementTree.tostring(root, encoding="unicode").replace(f' xmlns="{_SVG}"', "")


def _name_lines(group: ElementTree.Element, names: Sequence[tuple[str, str]]) -> None:
    """Write the label of each upright line above it. The line has the words as its title."""
    for path, (name, words) in zip(list(group), names, strict=False):
        ElementTree.SubElement(path, "title").text = words
        place = re.match(r"M([\d.]+)", path.get("d", ""))
        attributes = {"x": place[1] if place else "0", "y": "-4"}
        ElementTree.SubElement(group, "text", attributes).text = name


def _css(series: Sequence[Series], index: int) -> str:
    """Return the classes of a series: its look, and a colour that a faint line shares with the mean behind it."""
    look = series[index].look
    if look in ("restart", "commit", "evaluation", "lost"):
        return f"series {look}"
    color = sum(one.look != "faint" for one in series[:index])
    again = " again" if color >= SERIES_COLORS else ""
    return f"series {look} color-{color % SERIES_COLORS}{again}"


def _log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers from `low` to `high`. There are more of them if there are few powers of ten in between."""
    orders = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if len(orders) <= 3 else (1,)
    every = (digit * 10.0**order for order in orders for digit in digits)
    return [at for at in every if low <= at <= high] or [low]


def tick(value: float, digits: int = 4) -> str:
    """Return a number as an axis shows it: short, and with a letter if it is large."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.{digits}g}{suffix}"
    if 0 < abs(value) < 1e-3:
        power = math.floor(math.log10(abs(value)))
        return f"{value / 10.0**power:.{digits}g}e{power}"
    return f"{value:.{digits}g}"


def _digits(low: float, high: float) -> int:
    """Return the significant digits that tell the ticks of an axis apart."""
    return max(4, 2 + math.ceil(math.log10(max(abs(low), abs(high)) / (high - low))))


def spark(points: Sequence[Point], width: int = 110, height: int = 24) -> str:
    """Return the line of some points as an SVG without axes, for a table. It is empty for less than two points."""
    drawn = finite_points(points)
    if len(drawn) < 2:
        return ""
    (left, right), (low, high) = (_bounds([point[axis] for point in drawn]) for axis in (0, 1))
    places = ((width * (x - left) / (right - left), height * (high - y) / (high - low)) for x, y in drawn)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return (
        f'<svg class="spark" viewBox="0 -2 {width} {height + 4}" aria-hidden="true"><polyline points="{line}"/></svg>'
    )


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
