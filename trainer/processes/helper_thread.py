"""Threads beside other work, which nobody has to wait for. Unlike threads of a pool they do not keep a process from
ending.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

_FIRST_SECONDS, _NEXT_SECONDS = 2.0, 2.0
_LOOK_SECONDS = 0.1
_GROWTH = 400
"""A command may be silent for one part in so many of its age."""

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
        print(line, file=sys.stderr)


class _Doing(NamedTuple):
    """The present activity of a command, in words, and when it began."""

    words: str
    began: float


class _Watch:
    """Whether a whole command is watched, what it does now, the innermost last, and when it last printed anything."""

    active = False
    waits = False
    writes = False
    printed = 0.0

    def __init__(self) -> None:
        self.doing = list[_Doing]()


_watch = _Watch()


@contextmanager
def never_silent(doing: str) -> Iterator[None]:
    """Around a whole command that somebody waits for: whenever it has printed nothing for some seconds, a line on
    stderr says what it is doing, at first `doing`, later what `patiently` and `now_doing` say. The pauses grow with the
    command's age, so that a run of days has some thousand such lines.
    """

    def tell(done: threading.Event) -> None:
        began = time.monotonic()
        while not done.wait(_LOOK_SECONDS):
            now = time.monotonic()
            if now - _watch.printed >= max(_NEXT_SECONDS, (now - began) / _GROWTH) and not (
                _watch.waits or _watch.writes
            ):
                words, since = _watch.doing[-1]
                _to_stderr(f"{words}: {now - since:.0f} s so far")

    _watch.active, _watch.printed, _watch.doing = True, time.monotonic(), [_Doing(doing, time.monotonic())]
    try:
        with ExitStack() as heard:
            for stream in (sys.stdout, sys.stderr):
                heard.enter_context(_heard(stream))
            with helper_thread(tell, "what it is doing"):
                yield
    finally:
        _watch.active = False


@contextmanager
def _heard(stream: Any) -> Iterator[None]:
    """Inside, the watch knows when anything was written to `stream`."""
    plain = stream.write

    def write(text: str) -> int:
        _watch.writes = True  # a reader that pauses, such as a pager, keeps it here, and wants no lines between
        try:
            return plain(text)
        finally:
            _watch.writes, _watch.printed = False, time.monotonic()

    stream.write = write
    try:
        yield
    finally:
        stream.write = plain


def now_doing(words: str) -> None:
    """Say what the watched command does from now on, until the next call. A `patiently` meanwhile says its own."""
    if _watch.active:
        _watch.doing[0] = _Doing(words, time.monotonic())


@contextmanager
def waiting_for_a_person() -> Iterator[None]:
    """Inside, a watched command may be silent, as it is the other side's turn."""
    _watch.waits = True
    try:
        yield
    finally:
        _watch.waits, _watch.printed = False, time.monotonic()


@contextmanager
def patiently(doing: str, say: Callable[[str], None] = _to_stderr, every: float | None = None) -> Iterator[None]:
    """Around work that may take long while somebody waits at a terminal: after 2 seconds it says what it is `doing`,
    and then repeats that now and then, or both `every` so many seconds. In a command that is watched, its watch does
    so.
    """
    began = time.monotonic()

    def tell(done: threading.Event) -> None:
        pause = every or _FIRST_SECONDS
        while not done.wait(pause):
            say(f"{doing}: {time.monotonic() - began:.0f} s so far")
            pause = every or _NEXT_SECONDS

    if _watch.active and say is _to_stderr:
        _watch.doing.append(mine := _Doing(doing, began))
        try:
            yield
        finally:
            with suppress(ValueError):
                _watch.doing.remove(mine)
        return
    with helper_thread(tell, doing):
        yield
