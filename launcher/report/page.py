"""The page of one run: its figures, laid out.

Names, reasons and samples are others' texts, so everything is escaped.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import BaseLoader, ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from rich.filesize import decimal

from launcher.plan.summary import meaning
from launcher.report.figures import RunFigures, SampleFigures, SampleText, figures_over_steps
from launcher.report.history import FEW_POINTS, MOST_POINTS, PastStart, Point, means, thinned
from launcher.report.plots import Events, Plot, Series, lines, tick
from launcher.report.trained import SeenRows
from launcher.view.terminal import visible
from trainer.run.lines import duration

_GIB = 2**30
_LONGEST_WORDS = 300
_FEW_RESTARTS = 20
_BREAK = re.compile(r"(?<=[/._])|(?<=[^/._\s-]{16})")
"""A place in a name where a line may end; browsers know of those behind a space and a hyphen."""
FORMATS: Mapping[str, Callable[[Any], str]] = {
    "count": lambda value: f"{value:,}",
    "large": lambda value: tick(value) if value >= 1e4 else f"{value:,.4g}",
    "number": lambda value: f"{value:.4g}",
    "loss": lambda value: f"{value:.4f}",
    "signed": lambda value: f"{value:+.4f}",
    "percent": lambda value: f"{value:.1%}",
    "duration": lambda value: duration(value) if value >= 10 else f"{value:.2f} s",
    "hours": lambda value: f"{value:,.2f}" if value >= 0.1 else f"{value:.4f}",
    "energy": lambda value: f"{value / 1000:,.2f} kWh" if value >= 1000 else f"{value:.3g} Wh",
    "money": lambda value: f"{value:,.2f}",
    "bytes": decimal,
    "when": lambda value: f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d %H:%M}",
}


@dataclass(frozen=True)
class Measure:
    """How a number of the steps is drawn: its title, its unit, and the factor to that unit."""

    title: str
    unit: str = ""
    factor: float = 1.0

    def scaled(self, points: Sequence[Point]) -> list[Point]:
        return [(x, y * self.factor) for x, y in points]


_MEASURES = {
    "loss": Measure("Loss", "nats"),
    "lr": Measure("Learning rate"),
    "grad_norm": Measure("Gradient norm", "before clipping"),
    "reward": Measure("Reward", "mean of the answers"),
    "held_out_reward": Measure("Reward of held-out prompts", "mean of the likeliest answers"),
    "reward_spread": Measure("Spread of the reward", "standard deviation among the answers to a prompt"),
    "answer_tokens": Measure("Length of answers", "tokens"),
    "log_ratio": Measure("Trainer and sampler", "nats a token, absolute"),
    "entropy": Measure("Entropy of answers", "nats a token"),
    "lag": Measure("Lag of the sampler's adapter", "updates"),
    "tokens_per_second": Measure("Throughput", "tokens a second, all ranks"),
    "teraflops": Measure("Operations", "TFLOP a second and rank"),
    "mfu": Measure("Model FLOPs utilisation", "%", 100),
    "device_peak_bytes": Measure("GPU memory of rank 0", "GiB, peak so far", 1 / _GIB),
    "host_peak_bytes": Measure("Host memory of rank 0", "GiB, peak so far", 1 / _GIB),
    "device_watts": Measure("Power of rank 0's GPU", "W"),
    "expert_load": Measure("Routers: busiest expert", "visits over the mean, worst layer"),
    "experts_unused": Measure("Routers: experts that saw no token", "all layers"),
}


def run_page(figures: RunFigures, rows: SeenRows | None = None) -> str:
    """Return the whole HTML file, with some `rows` as the model saw them. It loads nothing and runs nothing."""
    known = (rows and rows.thumbnails) or {}

    def thumbnails(picture: Any) -> list[str]:
        return [known[picture.sha256]] if picture.sha256 in known else []

    return rendered("run.html.j2", figures.to_json(), **run_values(figures), rows=rows, thumbnails=thumbnails)


def run_values(figures: RunFigures) -> dict[str, Any]:
    """Return what the blocks of run.html.j2 show, beside the figures."""
    loss = {size: loss_plot(figures, wide=size == "wide") for size in ("wide", "narrow")}
    return {
        "run": figures,
        "trained": figures.trained,
        "loss": loss if all(loss.values()) else None,
        "measures": measure_plots(figures),
        "prompts": _by_prompt(figures.samples),
        "meaning": meaning,
    }


def _by_prompt(samples: Sequence[SampleFigures]) -> dict[str, list[tuple[int, SampleText]]]:
    """Return by prompt its answers at each step, with the place of the step among `samples`."""
    found: dict[str, list[tuple[int, SampleText]]] = {}
    for at, step in enumerate(samples):
        for sample in step.samples:
            found.setdefault(sample.prompt, []).append((at, sample))
    return found


def rendered(template: str, tree: Mapping[str, Any], **values: Any) -> str:
    """Render a page of a file with these values, which has its style in it."""
    style = Markup(files("launcher.report").joinpath("page.css").read_text(encoding="utf-8"))
    return visible(_environment().get_template(template).render(figure=figure_in(tree), style=style, **values))


def figure_in(tree: Mapping[str, Any]) -> Callable[..., Markup]:
    """Return a function for templates that shows the figure at a path of `tree`, which is the tree of `--json`."""

    def figure(begin: str | tuple[str | int, ...], *rest: str | int, kind: str) -> Markup:
        path = (*((begin,) if isinstance(begin, str) else begin), *rest)
        value: Any = tree
        for name in path:
            value = None if value is None else value[name]
        if value is None:
            return Markup("&ndash;")
        of = "/".join(map(str, path))
        return Markup('<data value="{}" data-of="{}">{}</data>').format(value, of, FORMATS[kind](value))

    return figure


@cache
def _environment() -> Environment:
    return environment()


def environment(*loaders: BaseLoader) -> Environment:
    """Return the templates of reports and of `loaders`, which all have the pieces of parts.html.j2."""
    loader = ChoiceLoader([PackageLoader("launcher", "report"), *loaders])
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters["breakable"] = breakable
    pieces: Any = pages.get_template("parts.html.j2").module
    pages.globals |= {name: getattr(pieces, name) for name in ("head", "drawn", "drawn_all", "bar", "seen")}
    return pages


def breakable(name: str) -> Markup:
    """Return `name`, escaped, with places where a line may end.

    So no table is as wide as a path, and no word ends just anywhere.
    """
    return Markup("<wbr>").join(_BREAK.split(name))


def loss_plot(figures: RunFigures, *, wide: bool) -> Plot | None:
    """Plot the loss of training and of every evaluation set, with commits and restarts."""
    measure = measure_of("loss")
    return lines(
        measure.title,
        _series(figures, "loss", MOST_POINTS),
        unit=f"nats a {figures.trained['loss_of']}",
        events=events(figures),
        wide=wide,
    )


def events(figures: RunFigures) -> Events:
    """Return what happened to the run, by steps."""
    numbers: dict[float, list[PastStart]] = {}
    for start in figures.restarts:
        numbers.setdefault(start.step or 0, []).append(start)
    return Events(
        {step: (f"start {', '.join(str(one.number) for one in of)}", _begun(of)) for step, of in numbers.items()},
        {commit["step"]: f"commit of step {commit['step']}" for commit in figures.commits},
        {one.step: f"evaluation of step {one.step}" for one in figures.evaluations},
        {
            start.last_step or start.step or 0: f"start {start.number}, {start.reason}"[:_LONGEST_WORDS]
            for start in figures.starts
            if start.lost
        },
    )


_KEPT = {"memory": ", from memory", "neighbour": ", from another machine's memory"}


def _begun(starts: Sequence[PastStart]) -> str:
    """Return on how many ranks the starts began, from where, and with which other settings than the ones before."""
    every = (
        "; ".join(
            [
                f"start {start.number} on {start.world_size or '?'} ranks{_KEPT.get(start.restored or '', '')}",
                *start.changes,
            ]
        )
        for start in starts
    )
    return ". ".join(every)[:_LONGEST_WORDS]


def _series(figures: RunFigures, name: str, most: int) -> list[Series]:
    """Return the lines of a measure: that of training, and one for each set.

    If there are more than `most` steps to show, the extremes are faint, and the means in front.
    """
    measure, curve, found = measure_of(name), figures.curves.get(name), list[Series]()
    points = thinned(curve.points, most) if curve else []
    if curve and (middle := curve.means or means(curve.points, most)):
        found.append(Series("lowest and highest", measure.scaled(points), "faint"))
        found.append(Series("training, mean", measure.scaled(middle)))
    elif curve:
        found.append(Series("training", measure.scaled(curve.points)))
    for of, points in figures.held_out.get(name, {}).items():
        found.append(Series(f"held out: {of}" if of else "held out", measure.scaled(points)))
    return found


def measure_plots(figures: RunFigures) -> list[Plot]:
    """Return a plot for each measure but the loss.

    First come the known measures, then those that an objective adds, then what else is measured every so many steps.
    """
    names = [*_MEASURES, *sorted((figures.curves.keys() | figures.held_out.keys()) - _MEASURES.keys())]
    every = events(figures)
    few = Events(every.restarts, lost=every.lost) if len(every.restarts) <= _FEW_RESTARTS else Events()
    plots = [_measure_plot(figures, name, few) for name in names if name != "loss"]
    for name, figure in figures_over_steps().items():
        series = [Series(line, points) for line, points in figures.over_steps.get(name, {}).items()]
        plots.append(lines(figure.title, series, unit=figure.unit, events=few))
    for by, curves in figures.measured.items():
        titles = {name: f"{_title(by)}: {name.replace('_', ' ')}" for name in curves}
        plots += [lines(titles[name], [Series(by, points)], unit="") for name, points in curves.items()]
    return list(filter(None, plots))


def measure_of(name: str) -> Measure:
    return _MEASURES.get(name, Measure(_title(name)))


def _title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _measure_plot(figures: RunFigures, name: str, few: Events) -> Plot | None:
    measure, series = measure_of(name), _series(figures, name, FEW_POINTS)
    seen = any(y for one in series for _, y in one.points)  # a count that stays 0 gets no plot
    return lines(measure.title, series, unit=measure.unit, events=few) if seen else None
