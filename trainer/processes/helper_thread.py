"""A thread that helps whatever is done meanwhile: it shows how far that is, or keeps others waiting for it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def helper_thread(
    work: Callable[[threading.Event], object], name: str, patience: float | None = None
) -> Iterator[None]:
    """Around what is done meanwhile: `work` gets an event that is set when it is over, and then has `patience` seconds to end, by default any."""
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(patience)
