"""The clock of a store, by which objects are stamped: clocks of machines may differ from it, and from each other."""

import time
from contextlib import suppress
from threading import Lock

from trainer.errors import NotFound, StorageError
from trainer.run import layout
from trainer.store.store import Store

_TRIES = 3  # somebody else may take the key away
_ALIKE_SECONDS = 5.0
"""Clocks that differ by less are one: stores stamp whole seconds, and a request takes its time."""


class StoreClock:
    """The time in seconds since 1970, by the clock of the store that `folder` is in. The first call writes a key for a
    moment; where nothing may be written, the machine's clock stands for the store's."""

    def __init__(self, folder: Store) -> None:
        self._folder, self._measuring = folder, Lock()
        self._ahead: float | None = None

    def __call__(self) -> float:
        with self._measuring:
            if self._ahead is None:
                self._ahead = _ahead(self._folder.failing_fast())
        return time.time() + self._ahead


def _ahead(folder: Store) -> float:
    """The seconds that the store's clock is ahead of this machine's."""
    with suppress(StorageError):
        for _ in range(_TRIES):
            before = time.time()
            folder.put(layout.CLOCK, b"")
            with suppress(NotFound):
                written = folder.head(layout.CLOCK).modified.timestamp()
                folder.delete(layout.CLOCK)
                found = written - (before + time.time()) / 2
                return found if abs(found) > _ALIKE_SECONDS else 0.0
    return 0.0
