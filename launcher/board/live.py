"""Pages that grow while somebody looks at them: what changes is sent as server-sent events. One shows a rank's log.

A part is an element of the page with an id. Nothing is read or drawn for a page that nobody has open. Drawing takes a
small share of one core, however much there is to draw: whoever trains on this machine needs the rest.
"""

import codecs
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import anyio
from markupsafe import escape
from starlette.responses import StreamingResponse

from launcher.report.figures import FiguresReader
from launcher.report.page import figure_in, run_values
from launcher.view.runs import is_there, poll_seconds
from launcher.view.status import ENDED
from launcher.view.terminal import in_lines, visible
from launcher.view.watch import rank_logs
from trainer.errors import CapstanError, ConfigError, NotFound
from trainer.run import layout
from trainer.run.segments import Appended, Segment, stored_bytes
from trainer.store.store import Entry, Store

Parts = dict[str, str]
"""The HTML of parts of a page, by their ids."""
Event = tuple[str, Any]
"""One of ("parts", Parts), ("text", texts to append by the ids of elements), and ("end", None), the last one."""
Look = Callable[[], Iterable[Event]]
"""Returns what is new since the last look. The first look of a page sends all that it shows."""

SHARE = 0.05
"""The share of a core that drawing for one page may take."""
_SHORTEST_SECONDS, _ENDED_SECONDS = 1.0, 10.0
_BEAT_SECONDS = 15.0
_MOST_RECORDS = 2**29  # bytes
_MOST_CURVES = 40
_LARGEST_PART = 2**18


def streamed(look: Look, interval: Callable[[], float]) -> StreamingResponse:
    """Return the stream of what looks find, with so many seconds between them.

    A look that fails is repeated: the store may answer again, and until then the page says that it does not.
    """

    async def stream() -> AsyncIterator[str]:
        trouble, quiet = "", _BEAT_SECONDS
        while True:
            before = trouble
            try:
                found = await anyio.to_thread.run_sync(lambda: list(look()), abandon_on_cancel=True)
                trouble = ""
            except Exception as error:
                said = f"{type(error).__name__}: the store does not answer as it should."
                found, trouble = [], str(escape(error)[:1000] if isinstance(error, CapstanError) else said)
            for kind, value in [*found, *([("parts", {"trouble": trouble})] if trouble != before else [])]:
                yield f"event: {kind}\ndata: {json.dumps(value)}\n\n"
                quiet = 0.0
                if kind == "end":
                    return
            if quiet >= _BEAT_SECONDS:
                yield ": still here\n\n"
                quiet = 0.0
            pause = interval()
            await anyio.sleep(pause)
            quiet += pause

    return StreamingResponse(stream(), media_type="text/event-stream")


def changes(draw: Callable[[], Parts]) -> Look:
    """Return looks that find the parts that have changed."""
    shown: Parts = {}

    def look() -> list[Event]:
        changed = {name: html for name, html in draw().items() if shown.get(name) != html}
        shown.update(changed)
        return [("parts", changed)] if changed else []

    return look


class LiveRun:
    """The parts of a page of one run, for everybody who looks at it: `blocks` of the report's run.html.j2."""

    def __init__(
        self, folder: Store, blocks: Sequence[str], render: Callable[[str, str, Mapping[str, Any]], str]
    ) -> None:
        self._folder, self._blocks, self._render = folder, blocks, render
        self._reader, self._drawing = FiguresReader(folder), threading.Lock()
        self._parts: Parts = {}
        self._due = 0.0
        self._config: Entry | None = None
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
        if not is_there(self._folder):
            raise ConfigError(f"{self._folder.uri} is no run any more.")
        self._begin_anew_if_new()
        size = sum(entry.size for entry in self._folder.list(layout.METRICS))
        if size > _MOST_RECORDS:
            return {"notes": f"The run has {size:,} bytes of records, too many for a page that grows."}
        figures = self._reader.read()
        self.state = figures.state
        figures = replace(figures, curves=dict(list(figures.curves.items())[:_MOST_CURVES]))
        values = {"figure": figure_in(figures.to_json()), **run_values(figures)}
        return {block: self._render("run.html.j2", block, values) for block in self._blocks}

    def _begin_anew_if_new(self) -> None:
        """Forget what was read of a run that somebody has removed, if another one has its name now.

        Each start writes the configuration, and a run that goes on is just read once more.
        """
        config = None
        with suppress(NotFound):  # the run is prepared
            config = self._folder.head(layout.CONFIG)
        if config != self._config:
            self._reader, self._config = FiguresReader(self._folder), config


def bounded(html: str) -> str:
    """Return the part, or a sentence in place of one that is too large for a page."""
    if len(html) <= _LARGEST_PART:
        return visible(html)
    return f'<p class="soft">This part has {len(html):,} characters, too many for this page. The report has it.</p>'


Log = tuple[int, int]
"""The number of a start, and a rank."""

_TAIL = 2**16
_PIECE = 2**20
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
"""Colours and movements of a terminal's cursor, which mean nothing on a page."""


def chosen_log(logs: Mapping[Log, Sequence[Segment]], given: Mapping[str, str]) -> Log | None:
    """Return the log that an address names, or rank 0's newest; None if there is no log."""
    start, rank = (given.get(name, "") for name in ("start", "rank"))
    named = (int(start), int(rank)) if start.isdecimal() and rank.isdecimal() and len(start + rank) < 20 else None
    return named if named in logs else max(logs, key=lambda log: (log[0], -log[1]), default=None)


def followed(folder: Store, given: Mapping[str, str]) -> Look:
    """Return looks at the end of the log that an address names, and then at what is appended."""
    appended, decoder = Appended(folder), codecs.getincrementaldecoder("utf-8")("replace")
    log: Log | None = None

    def look() -> list[Event]:
        nonlocal log
        logs, first = rank_logs(folder), log is None
        log = log or chosen_log(logs, given)
        if log not in logs:
            return []
        if first:
            appended.position = max(0, stored_bytes(logs[log]) - _TAIL)
        data = appended.read(logs[log])
        if len(data) > _PIECE:
            data = b"[...]\n" + data[-_TAIL:]
        begin: list[Event] = [("parts", {"log": ""})] if first else []
        return [*begin, ("text", {"log": text_of(decoder.decode(data))})] if data else begin

    return look


def text_of(text: str) -> str:
    """Return the text of a log for a page."""
    return visible(in_lines(_ANSI.sub("", text)))
