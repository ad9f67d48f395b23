"""Each rank's log in the run's folder: everything its process prints."""

import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from trainer.run import layout
from trainer.run.background import Every, try_now
from trainer.store import Store


@contextmanager
def rank_log(run: Store, generation: int, rank: int, flush_seconds: float) -> Iterator[Callable[[], None]]:
    """Send everything this process prints, libraries and C code included, to the rank's log in the store as well.

    File descriptors 1 and 2 go through a pipe; a thread copies it to where they led before and to the log. Yields a
    function that brings the store up to date, for a process that is about to end at once.
    """
    key = layout.rank_log(generation, rank)
    written, sent = bytearray(), 0
    read_end, write_end = os.pipe()
    saved = os.dup(1), os.dup(2)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(write_end, 1)
    os.dup2(write_end, 2)
    os.close(write_end)

    def copy() -> None:
        while data := os.read(read_end, 65536):
            written.extend(data)
            with suppress(OSError):  # the terminal may be gone; reading must go on, or every print would block
                os.write(saved[1], data)

    def send() -> None:
        nonlocal sent
        log = bytes(written)
        if len(log) > sent:
            run.put(key, log)
            sent = len(log)

    copier = threading.Thread(target=copy, name="rank-log", daemon=True)
    copier.start()
    flusher = Every(flush_seconds, send)

    def flush() -> None:
        deadline = time.monotonic() + 1
        while select.select([read_end], [], [], 0)[0] and time.monotonic() < deadline:
            time.sleep(0.01)  # the copier is still at it
        try_now(send)

    try:
        yield flush
    finally:
        flusher.stop()
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        copier.join(timeout=5)  # ends when the last copy of the pipe's write end is closed
        try_now(send)
