"""Requests to a run in progress, through its folder: to stop, or to be started again by its driver."""

import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import NamedTuple

from trainer.errors import NOT_JSON, NotFound
from trainer.run import layout
from trainer.run.background import Every
from trainer.store.store import Store

MACHINE_LEAVES = "because a machine of the run is being taken away"
"""Completes "stopped", in the reason of a start's end."""
_ON_REQUEST = "on request"


def request_stop(folder: Store, by: str | None = None, reason: str | None = None) -> None:
    """Ask the run to commit a checkpoint and end.

    `by` says who asks; the default names this process and host. `reason` completes "stopped at step 4"; the default is
    "on request".
    """
    request = {"time": time.time(), "by": by or f"process {os.getpid()} on {socket.gethostname()}"}
    folder.put(layout.STOP, json.dumps(request | ({"reason": reason} if reason else {})).encode())


def request_restart(folder: Store, reason: str) -> None:
    """Ask the ranks to commit a checkpoint and end, so that the driver starts them again.

    `reason` completes "stopped".
    """
    folder.put(layout.RESTART, json.dumps({"time": time.time(), "reason": reason}).encode())


class StopRequest(NamedTuple):
    """Who has asked a run to stop, and the words that complete "stopped" in messages."""

    by: str
    reason: str


def read_stop(folder: Store) -> StopRequest | None:
    """Return the current request; None if nobody has asked. An empty STOP, made by hand, stops a run too."""
    with suppress(NotFound):
        by = _word(folder, layout.STOP, "by", "somebody")
        return StopRequest(by, _word(folder, layout.STOP, "reason", f"by {by}"))
    return None


def stop_requester(folder: Store) -> str | None:
    """Return the name of the person or program that has asked the run to stop; None if nobody has."""
    asked = read_stop(folder)
    return asked.by if asked else None


def _word(folder: Store, key: str, name: str, otherwise: str) -> str:
    """Return the text under `name` in a request, else `otherwise`."""
    try:
        return str(json.loads(folder.get(key))[name])
    except (*NOT_JSON, LookupError, TypeError):
        return otherwise


class Stop(IntEnum):
    """A request for the next step border of a run. The stronger request has the higher number."""

    NO = 0
    RESTART = 1  # commit, and be started again
    END = 2  # commit, and end with exit code 75


class StopSignal:
    """The strongest request to this run.

    A request comes from `request()` (a signal handler), from the STOP or RESTART key in the run's folder, or from
    `preempted()`, which tells that a machine of the run is about to leave.
    """

    def __init__(
        self, folder: Store, *, watches: bool, seconds: float, preempted: Callable[[], bool] = lambda: False
    ) -> None:
        self._asked, self.reason = Stop.NO, _ON_REQUEST
        self._folder, self._preempted = folder, preempted
        # A look asks for one key only, because looks go on as long as the run does. RESTART gets fewer looks: only an
        # elastic run is asked for it, and it can wait.
        self._keys = itertools.cycle((layout.STOP, layout.STOP, layout.RESTART))
        self._watcher = Every(seconds, self._look, "looking for a stop request") if watches else None

    @property
    def requested(self) -> Stop:
        if self._asked is Stop.NO and self._preempted():
            self._asked, self.reason = Stop.RESTART, MACHINE_LEAVES
        return self._asked

    def request(self, reason: str = _ON_REQUEST) -> None:
        self._asked, self.reason = Stop.END, reason

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Treat SIGTERM and SIGUSR1 as requests to stop.

        Only a main thread may do this. Under Ray the driver gets the signals.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        asking = signal.SIGTERM, signal.SIGUSR1
        before = {number: signal.signal(number, lambda *_: self.request()) for number in asking}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _look(self) -> None:
        key = next(self._keys)
        if self._asked is Stop.END or not self._folder.exists(key):
            return
        reason = _word(self._folder, key, "reason", _ON_REQUEST)
        if key == layout.STOP:
            self.request(reason)
        elif self._asked is Stop.NO:
            self._asked, self.reason = Stop.RESTART, reason

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.stop()
