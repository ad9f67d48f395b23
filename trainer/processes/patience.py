"""A line now and then while something takes long, for whoever waits before a terminal."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from trainer.processes.helper_thread import helper_thread

_FIRST_SECONDS, _NEXT_SECONDS = 3.0, 10.0


def _to_stderr(line: str) -> None:
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


@contextmanager
def patiently(doing: str, say: Callable[[str], None] = _to_stderr, every: float | None = None) -> Iterator[None]:
    """Around what may take long: says what is `doing` once that has taken 3 seconds, and now and then that it goes on, or both `every` so many."""
    began = time.monotonic()

    def tell(done: threading.Event) -> None:
        pause = every or _FIRST_SECONDS
        while not done.wait(pause):
            say(f"{doing}: {time.monotonic() - began:.0f} s so far")
            pause = every or _NEXT_SECONDS

    with helper_thread(tell, doing):
        yield
