"""A time limit for a user's code, such as a chat template, that runs in this process and may never end."""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class OutOfTime(BaseException):
    """The code took longer than its limit. Not an `Exception`, which such code or a library around it might catch."""


class _Limit:
    """The deadline of one piece of code, in the thread that runs it."""

    def __init__(self, deadline: float) -> None:
        self.deadline, self.thread = deadline, threading.get_ident()


_running: set[_Limit] = set()
_lock = threading.Lock()
_watch: threading.Thread | None = None
_LOOK_SECONDS = 0.5


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises `OutOfTime` in the body when it has taken so many seconds, anywhere in its Python code. It costs
    microseconds, so it may be put around each row.
    """
    global _watch
    limit = _Limit(time.monotonic() + seconds)
    with _lock:
        _running.add(limit)
        # One thread watches all limits of this process. A signal would only reach the main thread, which seldom does
        # the work.
        if _watch is None or not _watch.is_alive():
            _watch = threading.Thread(target=_look, name="time-limit", daemon=True)
            _watch.start()
    try:
        yield
    finally:
        with _lock:
            _running.discard(limit)


def _look() -> None:
    while True:
        time.sleep(_LOOK_SECONDS)
        with _lock:
            for limit in [limit for limit in _running if limit.deadline < time.monotonic()]:
                _running.discard(limit)  # before it is raised, and so once
                # Python has no public function for it. A process for each row would take a thousand times as long as
                # the row, and a template that Jinja has compiled is code like any other, which asks nobody whether to
                # go on. tests/unit/evaluate/test_time_limit.py fails where Python does otherwise.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(limit.thread), ctypes.py_object(OutOfTime))
