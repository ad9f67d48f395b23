"""The driver's few words, kept in the run's folder after those of the drivers before it."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from trainer.errors import CapstanError, NotFound
from trainer.run import layout
from trainer.run.background import Harmless
from trainer.store.store import Store


class Journal:
    """Lines for `capstan logs RUN --driver`; `log` shows those that a person should see at once."""

    def __init__(self, folder: Store, log: Callable[[str], None]) -> None:
        self._run, self._log = folder, log
        self._harmless = Harmless("keeping the driver's log")
        self._text, self._keeping = "", threading.Lock()
        with suppress(NotFound):
            self._text = folder.get(layout.DRIVER_LOG).decode(errors="replace")
        self.keep(f"driver of process {os.getpid()} on {socket.gethostname()}")

    def write(self, line: str) -> None:
        self._log(line)
        self.keep(line)

    @contextmanager
    def to_the_end(self) -> Iterator[None]:
        """Keep how the body, which is the driver's work, ends."""
        try:
            yield
        except CapstanError as error:
            self.keep(f"ended with exit code {error.exit_code}: {error}")
            raise
        self.keep("finished")

    def keep(self, line: str) -> None:
        with self._keeping:  # what is beside the ranks has threads of its own
            self._text += f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n"
            self._harmless(lambda: self._run.put(layout.DRIVER_LOG, self._text.encode()))
