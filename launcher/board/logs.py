"""The log of a rank on a page: its end, as it grows."""

import codecs
import re
from collections.abc import Mapping, Sequence

from launcher.board.live import Event, Look
from launcher.view.terminal import in_lines, visible
from launcher.view.watch import rank_logs
from trainer.run.segments import Appended, Segment, stored_bytes
from trainer.store.store import Store

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
