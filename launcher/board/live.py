"""Pages that grow while somebody looks at them: their parts are drawn again, and those that have changed are sent.

A part is an element of the page with an id. Nothing is read or drawn for a page that nobody has open. Drawing takes a
small share of one core, however much there is to draw: whoever trains on this machine needs the rest.
"""

import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any

import anyio
from starlette.responses import StreamingResponse

from launcher.report.figures import Curve, FiguresReader
from launcher.report.history import means, thinned
from launcher.report.page import figure_in, run_values
from launcher.view.checkpoints import CheckpointList, list_checkpoints
from launcher.view.runs import poll_seconds
from launcher.view.status import ENDED
from launcher.view.terminal import visible
from trainer.run import layout
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.store import Store

Parts = dict[str, str]
"""The HTML of parts of a page, by their ids."""

SHARE = 0.05
"""The share of a core that drawing for one page may take."""
_SHORTEST_SECONDS, _ENDED_SECONDS = 1.0, 10.0
_BEAT_SECONDS = 15.0
_MOST_RECORDS = 2**29  # bytes
_MOST_CURVES, _MOST_POINTS = 40, 200
_LARGEST_PART = 2**18
BLOCKS = ("summary", "course", "starts", "evaluation", "measures", "time", "data", "repeat", "notes")
"""The blocks of the report's run.html.j2 that the page of a run has. Samples and logs have pages of their own."""


class LiveRun:
    """The parts of the page of one run, for everybody who looks at it."""

    def __init__(self, folder: Store, render: Callable[[str, str, Mapping[str, Any]], str]) -> None:
        self._folder, self._render = folder, render
        self._reader, self._drawing = FiguresReader(folder), threading.Lock()
        self._parts: Parts = {}
        self._steps: list[int] | None = None
        self._found: CheckpointList | None = None
        self._due = 0.0
        self.interval = _SHORTEST_SECONDS
        self.state = ""

    def parts(self) -> Parts:
        """Return the parts as they are now, or as they were a moment ago. Raises `StorageError`."""
        with self._drawing:
            if time.monotonic() >= self._due:
                began = time.thread_time()
                self._parts = self._draw()
                took = time.thread_time() - began
                shortest = _ENDED_SECONDS if self.state in ENDED else 2 * poll_seconds(self._folder)
                self.interval = max(_SHORTEST_SECONDS, shortest, took / SHARE)
                self._due = time.monotonic() + self.interval
            return self._parts

    def draw_soon(self) -> None:
        """Draw anew at the next look, as something was done with the run."""
        self._due = 0.0

    def _draw(self) -> Parts:
        size = sum(entry.size for entry in self._folder.list(layout.METRICS))
        if size > _MOST_RECORDS:
            return {"notes": f"The run has {size:,} bytes of records, too many for a page that grows."}
        figures = self._reader.read()
        self.state = figures.state
        shown = list(figures.curves.items())[:_MOST_CURVES]
        curves = {name: curve if name == "loss" else _fewer_points(curve) for name, curve in shown}
        figures = replace(figures, curves=curves)
        values = {"figure": figure_in(figures.to_json()), **run_values(figures)}
        if (steps := committed_steps(self._folder)) != self._steps:
            self._found, self._steps = list_checkpoints(self._folder), steps
        parts = {block: self._render("run.html.j2", block, values) for block in BLOCKS}
        return parts | {"checkpoints": self._render("checkpoints.html.j2", "checkpoints", {"found": self._found})}


def _fewer_points(curve: Curve) -> Curve:
    """Return a curve as a small plot shows it: still with the extremes of all steps, and their means."""
    points = thinned(curve.points, _MOST_POINTS)
    return replace(curve, points=points, means=curve.means or means(curve.points, _MOST_POINTS))


def bounded(html: str) -> str:
    """Return the part, or a sentence in place of one that is too large for a page."""
    if len(html) <= _LARGEST_PART:
        return visible(html)
    return f'<p class="soft">This part has {len(html):,} characters, too many for this page. The report has it.</p>'


def events(draw: Callable[[], Parts], interval: Callable[[], float], last: Parts) -> StreamingResponse:
    """Return the stream of the parts that change. `last` is what the page has already."""

    async def stream() -> AsyncIterator[str]:
        shown, quiet = dict(last), 0.0
        yield ": the parts that change\n\n"
        while True:
            try:
                parts = await anyio.to_thread.run_sync(draw, abandon_on_cancel=True)
            except Exception as error:  # the store may answer again; the page says that it does not
                parts = {"trouble": f"{type(error).__name__}: the store does not answer as it should."}
            else:
                parts["trouble"] = ""
            changed = {name: html for name, html in parts.items() if shown.get(name) != html}
            if changed:
                shown, quiet = parts, 0.0
                yield sent("parts", changed)
            elif quiet >= _BEAT_SECONDS:
                quiet = 0.0
                yield ": still here\n\n"
            pause = interval()
            await anyio.sleep(pause)
            quiet += pause

    return streamed(stream())


def streamed(stream: AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(stream, media_type="text/event-stream")


def sent(kind: str, value: Any) -> str:
    """Return one server-sent event."""
    return f"event: {kind}\ndata: {json.dumps(value)}\n\n"
