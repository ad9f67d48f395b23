"""Each rank's log in the run's folder: everything that its process prints."""

import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from trainer.run import layout
from trainer.run.background import Every, Harmless
from trainer.run.segments import BLOCK_BYTES, Appender
from trainer.store.store import Store

_FIRST_SECONDS = 30.0
"""In the long run, rank 0's log is sent once in so many seconds."""
_OTHERS_SECONDS = 20.0
"""In the long run, the logs of all other ranks together are sent once in so many seconds."""
_AT_ONCE = 10
"""So many times a rank may send its log as soon as something is printed; a quiet time earns them back."""


def tell(text: str) -> None:
    """Print a line of the run's log at once: somebody reads it while the run goes on."""
    print(text, flush=True)


class Allowance:
    """An allowance that grows by one every `seconds`, and holds at most `most`."""

    def __init__(self, seconds: float, most: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds, self._most, self._clock = seconds, most, clock
        self._left, self._looked = most, clock()

    def take(self) -> bool:
        """Take one from the allowance. Returns whether there was one."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._looked) / self._seconds)
        self._looked = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


def log_allowance(rank: int, world_size: int, clock: Callable[[], float] = time.monotonic) -> Allowance:
    """Return how often `rank` may send its log.

    All ranks but the first share one budget, however many they are.
    """
    # The fraction spreads the ranks: those that began together would otherwise also send their logs together.
    most = _AT_ONCE + rank / world_size
    return Allowance(_OTHERS_SECONDS * world_size if rank else _FIRST_SECONDS, most, clock)


@contextmanager
def rank_log(
    folder: Store, generation: int, rank: int, world_size: int, flush_seconds: float
) -> Iterator[Callable[[], None]]:
    """Send everything that this process prints, libraries and C code included, to the rank's log in the store as well.

    File descriptors 1 and 2 go through a pipe. A thread copies the pipe to where they led before, and to the log.
    Yields a function that brings the store up to date, for a process that is about to end at once. The log of a rank
    that prints little is sent within `flush_seconds`. The requests of all ranks together are bounded.
    """
    log = Appender(folder, layout.rank_log(generation, rank))
    allowance = log_allowance(rank, world_size)
    read_end, write_end = os.pipe()
    saved = os.dup(1), os.dup(2)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(write_end, 1)
    os.dup2(write_end, 2)
    os.close(write_end)

    def copy() -> None:
        # Reading must go on whatever fails, because otherwise every print would block. Nothing may be printed here,
        # because it would come back through the pipe.
        while data := os.read(read_end, 65536):
            with suppress(Exception):
                log.append(data)
            with suppress(OSError):
                os.write(saved[1], data)

    def send_if_due() -> None:
        if log.unsent and (log.unsent >= BLOCK_BYTES or allowance.take()):
            harmless(log.flush)

    harmless = Harmless("sending the log")
    copier = threading.Thread(target=copy, name="rank-log", daemon=True)
    copier.start()
    flusher = Every(flush_seconds, send_if_due, "sending the log")

    def flush() -> None:
        deadline = time.monotonic() + 1
        while select.select([read_end], [], [], 0)[0] and time.monotonic() < deadline:
            time.sleep(0.01)  # the copier is still working
        harmless(log.flush)

    try:
        yield flush
    finally:
        flusher.stop()
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        copier.join(timeout=5)  # it ends when the last copy of the pipe's write end is closed
        harmless(log.close)
