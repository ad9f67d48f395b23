"""Threads beside whatever is done meanwhile, which nobody has to wait for: unlike those of a pool they keep no process
from ending.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TypeVar

_FIRST_SECONDS, _NEXT_SECONDS = 3.0, 10.0

T = TypeVar("T")


def in_thread(work: Callable[[], T], name: str) -> Future[T]:
    """Do `work` in a thread of its own; the future has what it returns or raises."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(result)

    threading.Thread(target=run, name=name, daemon=True).start()
    return done


@contextmanager
def helper_thread(
    work: Callable[[threading.Event], object], name: str, patience: float | None = None
) -> Iterator[None]:
    """Around what is done meanwhile: `work` gets an event that is set when it is over, and then has `patience` seconds
    to end, by default any.
    """
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(patience)


def _to_stderr(line: str) -> None:
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


@contextmanager
def patiently(doing: str, say: Callable[[str], None] = _to_stderr, every: float | None = None) -> Iterator[None]:
    """Around what may take long, for whoever waits before a terminal: says what is `doing` once that has taken 3
    seconds, and now and then that it goes on, or both `every` so many.
    """
    began = time.monotonic()

    def tell(done: threading.Event) -> None:
        pause = every or _FIRST_SECONDS
        while not done.wait(pause):
            say(f"{doing}: {time.monotonic() - began:.0f} s so far")
            pause = every or _NEXT_SECONDS

    with helper_thread(tell, doing):
        yield
