"""Work beside the training that never decides how the training ends: metrics, logs, and the look for requests."""

import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from trainer.config.secrets import without_credentials


def say(text: str) -> None:
    """Print a line on stderr, without the parts that open the URLs in it, because logs are kept.

    A line that cannot be written, for example to a full disk, is dropped.
    """
    with suppress(OSError, ValueError):
        print(without_credentials(text), file=sys.stderr)


class Harmless:
    """Calls functions that may fail in any way, without harm to the caller.

    A failure is reported once, and again only after a success in between.
    """

    def __init__(self, what: str) -> None:
        self._what, self._failing = what, False

    def __call__(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:  # a panic inside obstore is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit) and _in_main_thread():
                raise
            if not self._failing:
                said = f"{type(error).__name__}: {error}".rstrip(".")
                say(f"{self._what} failed, which does not end the run, and will be tried again: {said}.")
            self._failing = True
        else:
            self._failing = False


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class Every:
    """Calls `action` every so many seconds in a background thread, which survives every failure of it."""

    def __init__(self, seconds: float, action: Callable[[], object], what: str) -> None:
        self._woken = threading.Event()
        self._stopped = False
        self._seconds, self._action, self._harmless = seconds, action, Harmless(what)
        self._thread = threading.Thread(target=self._loop, name=what, daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while True:
            self._woken.wait(self._seconds)
            if self._stopped:
                return
            self._woken.clear()
            self._harmless(self._action)

    def now(self) -> None:
        """Call `action` now, in the thread."""
        self._woken.set()

    def stop(self, *, wait: bool = True) -> None:
        """Stop the thread. Wait until it has ended, unless nobody needs its last result (`wait` is false)."""
        self._stopped = True
        self._woken.set()
        if wait:
            self._thread.join()
