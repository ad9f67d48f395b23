"""Threads beside other work, which nobody has to wait for. Unlike threads of a pool they do not keep a process from
ending.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TypeVar

_FIRST_SECONDS, _NEXT_SECONDS = 2.0, 2.5

T = TypeVar("T")


def in_thread(work: Callable[[], T], name: str) -> Future[T]:
    """Do `work` in a thread of its own. The future gets what it returns or raises."""
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
    """Run `work` in a thread beside the body. It gets an event that is set when the body ends, and then has `patience`
    seconds to end, by default as long as it takes.
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
    """Around work that may take long while somebody waits at a terminal: after 2 seconds it says what it is `doing`,
    and then repeats that now and then, or both `every` so many seconds.
    """
    began = time.monotonic()

    def tell(done: threading.Event) -> None:
        pause = every or _FIRST_SECONDS
        while not done.wait(pause):
            say(f"{doing}: {time.monotonic() - began:.0f} s so far")
            pause = every or _NEXT_SECONDS

    with helper_thread(tell, doing):
        yield
