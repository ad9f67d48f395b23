"""Pages as people see them: a real Chromium opens a file, and tells what is wrong with it."""

import itertools
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.needs import need

_PATIENCE_MS = 30_000
_TOUCHING = 1.0  # pixels that two boxes may share by rounding
# The boxes of all plots that are shown, and within each those of the ticks on an axis: [left, top, right, bottom].
_BOXES = """() => {
    const box = node => { const at = node.getBoundingClientRect(); return [at.left, at.top, at.right, at.bottom]; };
    const shown = node => node.getClientRects().length > 0;
    return [...document.querySelectorAll('svg.chart')].filter(shown).map(plot => ({
        title: plot.getAttribute('aria-label'),
        box: box(plot),
        drawn: [...plot.querySelectorAll('.series path, .series circle')].map(box),
        ticks: ['.axis.x', '.axis.y'].map(axis => [...plot.querySelectorAll(axis + ' text')].map(box)),
    }));
}"""
# The contrast of texts and lines with what is behind them (WCAG 2.2): [what, ratio].
_CONTRASTS = """() => {
    const rgb = color => color.match(/[\\d.]+/g).slice(0, 3).map(Number);
    const light = color => {
        const [r, g, b] = rgb(color).map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const paper = node => {
        for (let at = node; at; at = at.parentElement) {
            const color = getComputedStyle(at).backgroundColor;
            if (color !== 'rgba(0, 0, 0, 0)') return color;
        }
        return 'rgb(255, 255, 255)';
    };
    const ratio = (one, other) => { const [a, b] = [light(one), light(other)].sort((x, y) => y - x); return (a + 0.05) / (b + 0.05); };
    const found = [];
    for (const node of document.querySelectorAll('h1, h2, h3, p, td, th, dt, dd, small, code, pre, .state, .legend li')) {
        if (node.getClientRects().length) found.push(['text ' + node.tagName + '.' + node.className, ratio(getComputedStyle(node).color, paper(node))]);
    }
    for (const node of document.querySelectorAll('.chart .axis text')) {
        if (node.getClientRects().length) found.push(['text of a tick', ratio(getComputedStyle(node).fill, paper(node.closest('figure')))]);
    }
    for (const node of document.querySelectorAll('.chart .series:not(.faint)')) {
        if (node.getClientRects().length) found.push(['line ' + node.className.baseVal, ratio(getComputedStyle(node).color, paper(node.closest('figure')))]);
    }
    return found;
}"""


@dataclass
class Look:
    """One look at a page. `wrong` has a sentence for each thing that is wrong, `plots` the titles of those that are
    shown.
    """

    wrong: list[str] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of playwright's; the test is skipped where there is no Chromium."""
    path = shutil.which("chromium")
    need(None if path else "a real browser needs chromium (apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"], timeout=_PATIENCE_MS)
        try:
            yield browser
        finally:
            browser.close()


def look_at(
    browser: Any,
    page: Path,
    *,
    width: int,
    scheme: str = "light",
    media: str = "screen",
) -> Look:
    """Open the file in a window of so many pixels, with nothing else to load; `scheme` is light or dark, `media` screen
    or print.
    """
    look = Look()
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab.on("console", lambda message: look.wrong.append(f"the console says: {message.text}"))
    tab.on("pageerror", lambda error: look.wrong.append(f"a script failed: {error}"))
    tab.on(
        "request", lambda asked: asked.url in (page.as_uri(), "data:,") or look.wrong.append(f"it asks for {asked.url}")
    )
    try:
        tab.emulate_media(media=media, color_scheme=scheme)
        tab.goto(page.as_uri(), timeout=_PATIENCE_MS)
        wide = tab.evaluate("document.documentElement.scrollWidth")
        if wide > width:
            look.wrong.append(f"it is {wide} pixels wide in a window of {width}")
        _look_at_plots(look, tab.evaluate(_BOXES))
        for what, ratio in tab.evaluate(_CONTRASTS):
            if ratio < (4.5 if what.startswith("text") else 3.0):
                look.wrong.append(f"{what} has a contrast of {ratio:.2f}")
    finally:
        tab.close()
    return look


def _look_at_plots(look: Look, plots: list[dict[str, Any]]) -> None:
    look.plots = [plot["title"] for plot in plots]
    for plot in plots:
        left, top, right, bottom = plot["box"]
        if right - left < 200 or bottom - top < 100 or not plot["drawn"]:
            look.wrong.append(
                f"{plot['title']} is empty, or no larger than {right - left:.0f} x {bottom - top:.0f} pixels"
            )
        if any(not _inside(drawn, plot["box"]) for drawn in plot["drawn"]):
            look.wrong.append(f"{plot['title']} draws outside of itself")
        for ticks in plot["ticks"]:
            if any(not _inside(tick, plot["box"]) for tick in ticks):
                look.wrong.append(f"a tick of {plot['title']} is outside of it")
            if any(_overlap(*pair) for pair in itertools.combinations(ticks, 2)):
                look.wrong.append(f"the ticks of {plot['title']} overlap")
    for one, other in itertools.combinations(plots, 2):
        if _overlap(one["box"], other["box"]):
            look.wrong.append(f"{one['title']} and {other['title']} overlap")


def _overlap(one: list[float], other: list[float]) -> bool:
    return (
        min(one[2], other[2]) - max(one[0], other[0]) > _TOUCHING
        and min(one[3], other[3]) - max(one[1], other[1]) > _TOUCHING
    )


def _inside(one: list[float], other: list[float]) -> bool:
    return all(a >= b - _TOUCHING for a, b in zip(one[:2], other[:2], strict=True)) and all(
        a <= b + _TOUCHING for a, b in zip(one[2:], other[2:], strict=True)
    )
