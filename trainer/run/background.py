"""Work that a run does again and again beside its training, and that never decides how it ends."""

import sys
import threading
from collections.abc import Callable

from trainer.errors import StorageError


class Every:
    """Calls `action` every so many seconds in a background thread. A store that fails now is tried again next time."""

    def __init__(self, seconds: float, action: Callable[[], None]) -> None:
        self._woken = threading.Event()
        self._stopped = False
        self._seconds, self._action = seconds, action
        self._thread = threading.Thread(target=self._loop, name=f"every-{seconds}s", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        while True:
            self._woken.wait(self._seconds)
            if self._stopped:
                return
            self._woken.clear()
            try_now(self._action)

    def now(self) -> None:
        """Call `action` now, in the thread."""
        self._woken.set()

    def stop(self) -> None:
        self._stopped = True
        self._woken.set()
        self._thread.join()


def try_now(action: Callable[[], None]) -> None:
    """Metrics and logs must never decide how a run ends."""
    try:
        action()
    except StorageError as error:
        print(f"will be tried again: {error}", file=sys.stderr)
