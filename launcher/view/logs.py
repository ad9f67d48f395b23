"""Show the output of a run from its folder alone: that of its ranks and drivers, and its progress as plain lines.

The plain lines are for places without a terminal.
"""

import codecs
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from launcher.view.runs import poll_seconds
from trainer.errors import ConfigError, NotFound, StorageError
from trainer.run import layout
from trainer.run.lines import PlainLines
from trainer.run.records import RunReader, generations
from trainer.run.segments import Appended, Segment, read_stream, streams
from trainer.store.store import Store


def read_log(folder: Store, rank: int, generation: int | None = None) -> str:
    """Return the output of `rank` in `generation`; by default in the newest one that it has a log of.

    Raises `ConfigError` when there is no such log, naming the ranks that have one.
    """
    logs = _logs(folder)
    newest = max((number for number, owner in logs if owner == rank), default=None)
    chosen = newest if generation is None else generation
    if chosen is None or (chosen, rank) not in logs:
        of = "" if generation is None else f" in generation {generation}"
        known = sorted({owner for number, owner in logs if generation in (None, number)})
        ranks = ", ".join(map(str, known)) or "none"
        raise ConfigError(f"rank {rank} of {folder.uri} has no log{of}. Ranks with one: {ranks}.")
    return read_stream(folder, layout.LOGS, layout.rank_log(chosen, rank)).decode(errors="replace")


def read_driver_log(folder: Store) -> str:
    """Return the messages of the run's drivers, one line each with its time."""
    try:
        return folder.get(layout.DRIVER_LOG).decode(errors="replace")
    except NotFound as error:
        raise ConfigError(
            f"{folder.uri} has no driver's log: its ranks were started by torchrun or srun, or it never ran."
        ) from error


def follow_log(
    folder: Store,
    rank: int,
    generation: int | None = None,
    *,
    stop: Callable[[], bool] = lambda: False,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[str]:
    """Yield the output of `rank` as it comes in, until `stop()` holds.

    Without `generation` it continues into every new one.
    """
    first = generation
    readers: dict[int, tuple[Appended, codecs.IncrementalDecoder]] = {}
    while True:
        last_look = stop()
        logs = {number: segments for (number, owner), segments in sorted(_logs(folder).items()) if owner == rank}
        if first is None:
            first = max(logs, default=None)
        for number, segments in logs.items():
            if first is None or number < first or generation not in (None, number):
                continue
            if number not in readers:
                readers[number] = Appended(folder), codecs.getincrementaldecoder("utf-8")("replace")
            appended, decoder = readers[number]
            if text := decoder.decode(appended.read(segments)):
                yield text
        if last_look:
            return
        wait(poll_seconds(folder))


def _logs(folder: Store) -> dict[tuple[int, int], list[Segment]]:
    """Return (generation, rank) -> the log's segments."""
    found = {}
    for stream, segments in streams(folder.list(layout.LOGS)).items():
        numbers = [int(digits) for digits in re.findall(r"\d+", stream)]
        if len(numbers) == 2 and layout.rank_log(*numbers) == stream:
            found[numbers[0], numbers[1]] = segments
    return found


def follow_lines(
    folder: Store,
    stop: Callable[[], bool],
    every: int,
    log: Callable[[str], None],
    *,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Give `log` the lines of the starts that begin from now on, and of some steps, until `stop()` is true."""
    lines, reader, before = PlainLines(every), RunReader(folder), None
    while every:
        last_look = stop()
        with suppress(StorageError):  # the run itself is patient with the store
            if before is None:
                before = max(generations(folder), default=0)
            for number, records in reader.read(streams(folder.list(layout.METRICS))):
                for record in records if number > before else ():
                    if text := lines.of(record):
                        log(text)
        if last_look:
            return
        wait(3 * poll_seconds(folder))  # a log is read less often than a live view
