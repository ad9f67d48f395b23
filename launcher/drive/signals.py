"""Stops that a driver itself asks for.

A signal asks the run to commit and end, and so does a failure to compile the rest of the data. The driver's work leaves
the main thread free for signals.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager

from trainer.errors import StorageError
from trainer.processes.helper_thread import in_thread
from trainer.run import layout
from trainer.run.background import say
from trainer.run.owner import Ownership
from trainer.run.requests import request_stop, stop_requester
from trainer.store.store import Store

ENDED_AT_ONCE = 130
"""The exit code after a second Ctrl-C."""
BY_COMPILATION = "the compilation of its data"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextmanager
def stop_on_signals(owner: Ownership) -> Iterator[None]:
    """Turn SIGTERM, SIGUSR1 and Ctrl-C into a stop request in the run's folder.

    A second Ctrl-C ends this process at once.
    """

    def ask(number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        # The request is made in a thread: a store that does not answer must not delay this process's next signal.
        threading.Thread(target=_ask, args=(owner, name), name="stop", daemon=True).start()
        if number == signal.SIGINT:
            say("stopping after a commit; Ctrl-C again ends at once")
            signal.signal(signal.SIGINT, lambda *_: os._exit(ENDED_AT_ONCE))

    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask(owner: Ownership, name: str) -> None:
    try:
        if owner.lost:  # a request would stop the start that has the run now
            say(f"{name}: {owner.run.uri} has been taken over by another start, so this one ends")
            os._exit(ENDED_AT_ONCE)
        request_stop(owner.run, by=name)
    except StorageError as error:
        say(f"{name}: the run could not be asked to stop: {error}")


def forget_own_stop(folder: Store) -> None:
    """Clear stop requests made by signals or by the compilation, so they do not stop the next start.

    A person's request stays.
    """
    if stop_requester(folder) in {BY_COMPILATION, *(number.name for number in _SIGNALS)}:
        folder.delete(layout.STOP)


def beside_main_thread(work: Callable[[], None]) -> None:
    """Run `work` in a thread, and raise here what it raises.

    In the main thread Ray would install handlers of its own.
    """
    done = in_thread(work, "driver")
    while not wait([done], timeout=0.2).done:  # short: Python runs signal handlers only between its own instructions
        for number in _SIGNALS:
            signal.signal(number, signal.getsignal(number))  # before Ray's own, which print a stack trace first
    done.result()
