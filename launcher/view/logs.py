"""What a run's ranks and drivers printed, from its folder alone, during and after the run."""

import codecs
import re
import time
from collections.abc import Callable, Iterator

from launcher.view.tail import Appended, poll_seconds
from trainer.errors import ConfigError, NotFound
from trainer.run import layout
from trainer.store import Entry, Store


def read_log(run: Store, rank: int, generation: int | None = None) -> str:
    """What `rank` printed in `generation`; by default in the newest one that it has a log of.

    Raises `ConfigError` when there is no such log, naming the ranks that have one.
    """
    logs = _logs(run)
    newest = max((number for number, owner in logs if owner == rank), default=None)
    chosen = newest if generation is None else generation
    if chosen is None or (chosen, rank) not in logs:
        of = "" if generation is None else f" in generation {generation}"
        known = sorted({owner for number, owner in logs if generation in (None, number)})
        ranks = ", ".join(map(str, known)) or "none"
        raise ConfigError(f"rank {rank} of {run.uri} has no log{of}. Ranks with one: {ranks}.")
    return run.get(layout.rank_log(chosen, rank)).decode(errors="replace")


def read_driver_log(run: Store) -> str:
    """What the run's drivers said, one line each with its time."""
    try:
        return run.get(layout.DRIVER_LOG).decode(errors="replace")
    except NotFound as error:
        raise ConfigError(
            f"{run.uri} has no driver's log: its ranks were started by torchrun or srun, or it never ran."
        ) from error


def follow_log(
    run: Store,
    rank: int,
    generation: int | None = None,
    *,
    stop: Callable[[], bool] = lambda: False,
    wait: Callable[[float], None] = time.sleep,
) -> Iterator[str]:
    """What `rank` prints, as it comes in, until `stop()` is true. Without `generation` it goes on into every new one."""
    first = generation
    readers: dict[int, tuple[Appended, codecs.IncrementalDecoder]] = {}
    while True:
        last_look = stop()
        logs = {number: entry for (number, owner), entry in sorted(_logs(run).items()) if owner == rank}
        if first is None:
            first = max(logs, default=None)
        for number, entry in logs.items():
            if first is None or number < first or generation not in (None, number):
                continue
            if number not in readers:
                readers[number] = Appended(run, entry.key), codecs.getincrementaldecoder("utf-8")("replace")
            appended, decoder = readers[number]
            if text := decoder.decode(appended.read(entry.size)):
                yield text
        if last_look:
            return
        wait(poll_seconds(run))


def _logs(run: Store) -> dict[tuple[int, int], Entry]:
    """(generation, rank) -> the log's entry."""
    found = {}
    for entry in run.list(layout.LOGS):
        numbers = [int(digits) for digits in re.findall(r"\d+", entry.key)]
        if len(numbers) == 2 and layout.rank_log(*numbers) == entry.key:
            found[numbers[0], numbers[1]] = entry
    return found
