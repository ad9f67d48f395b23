"""The logs of a run's ranks: their end, which grows on the page, and the lines that hold some words."""

import re
from collections.abc import AsyncIterator, Mapping, Sequence

import anyio

from launcher.board.live import sent
from launcher.view.runs import poll_seconds
from launcher.view.terminal import in_lines, visible
from launcher.view.watch import rank_logs
from trainer.run.segments import Appended, Segment, stored_bytes
from trainer.store.store import Store

Log = tuple[int, int]
"""The number of a start, and a rank."""

_TAIL = 2**16
_PIECE = 2**20
_SEARCHED = 2**26
_MOST_FOUND, _LONGEST_LINE = 200, 2000
_ANSI = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
"""Colours and movements of a terminal's cursor, which mean nothing on a page."""


def chosen_log(logs: Mapping[Log, Sequence[Segment]], given: Mapping[str, str]) -> Log | None:
    """Return the log that an address names, or rank 0's newest; None if there is no log."""
    start, rank = (given.get(name, "") for name in ("start", "rank"))
    named = (int(start), int(rank)) if start.isdecimal() and rank.isdecimal() and len(start + rank) < 20 else None
    return named if named in logs else max(logs, key=lambda log: (log[0], -log[1]), default=None)


async def followed(folder: Store, log: Log | None) -> AsyncIterator[str]:
    """Yield the end of a log as events, and then what is appended, for as long as somebody listens."""
    appended: Appended | None = None
    while log is not None:
        segments = (await anyio.to_thread.run_sync(rank_logs, folder)).get(log)
        if segments:
            appended = appended or _at_end(folder, segments)
            data = await anyio.to_thread.run_sync(appended.read, segments)
            if len(data) > _PIECE:
                data = b"[...]\n" + data[-_TAIL:]
            if data:
                yield sent("text", text_of(data))
        yield ": still here\n\n"
        await anyio.sleep(2 * poll_seconds(folder))


def _at_end(folder: Store, segments: Sequence[Segment]) -> Appended:
    appended = Appended(folder)
    appended.position = max(0, stored_bytes(segments) - _TAIL)
    return appended


def text_of(data: bytes) -> str:
    """Return a log's bytes as text for a page."""
    return visible(in_lines(_ANSI.sub("", data.decode(errors="replace"))))


def search(folder: Store, segments: Sequence[Segment], words: str) -> tuple[list[str], bool]:
    """Return the last lines that hold all `words`, and whether the whole log was searched."""
    wanted, found, size = words.lower().encode().split(), list[str](), stored_bytes(segments)
    begin = max(0, size - _SEARCHED)
    for segment in segments:
        first = max(begin - segment.begin, 0)
        for start in range(first, segment.entry.size, _PIECE):
            data = bytes(folder.get_range(segment.entry.key, start, min(start + _PIECE, segment.entry.size)))
            lines = (line for line in data.split(b"\n") if all(word in line.lower() for word in wanted))
            found += [text_of(line[:_LONGEST_LINE]) for line in lines]
            del found[:-_MOST_FOUND]
    return found, begin == 0
