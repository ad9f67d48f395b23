"""A run's progress where there is no terminal: a plain line for what happens, such as a log keeps."""

import time
from collections.abc import Callable
from contextlib import suppress

from launcher.view.tail import poll_seconds
from trainer.errors import StorageError
from trainer.run import layout
from trainer.run.lines import PlainLines
from trainer.run.records import RunReader, generations
from trainer.run.segments import streams
from trainer.store.store import Store


def follow_lines(
    folder: Store,
    stop: Callable[[], bool],
    every: int,
    log: Callable[[str], None],
    *,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Give `log` the lines of the starts that begin from now on, a step in every so many, until `stop()` is true."""
    lines, reader, before = PlainLines(every), RunReader(folder), None
    while every:
        last_look = stop()
        with suppress(StorageError):  # the run has its own patience with the store
            if before is None:
                before = max(generations(folder), default=0)
            for number, records in reader.read(streams(folder.list(layout.METRICS))):
                for record in records if number > before else ():
                    if text := lines.of(record):
                        log(text)
        if last_look:
            return
        wait(3 * poll_seconds(folder))  # a log is looked at less often than a live view
