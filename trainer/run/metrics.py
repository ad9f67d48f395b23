"""What a run tells the world: one JSON object a line in the store, TensorBoard events, and each rank's log.

Object stores cannot append, so a file is written again whole every `flush_seconds` from a background thread.
"""

import json
import os
import resource
import select
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch

from trainer.errors import AlreadyExists, StorageError
from trainer.run import layout
from trainer.store import Store


def claim_generation(run: Store) -> int:
    """The number of this start of the run, from 1: claimed by creating its metrics file, so two starts never share one."""
    taken = [layout.generation_of(entry.key) or 0 for entry in run.list(layout.METRICS)]
    generation = max(taken, default=0) + 1
    while True:
        try:
            run.create(layout.metrics(generation), b"")
        except AlreadyExists:
            generation += 1
        else:
            return generation


class Metrics:
    """The metrics of one generation; rank 0 writes, the others' calls do nothing."""

    def __init__(self, run: Store, generation: int, *, writes: bool, flush_seconds: float, tensorboard: bool) -> None:
        self._run, self._key = run, layout.metrics(generation)
        self._writes = writes
        self._lines: list[str] = []
        self._folder = tempfile.TemporaryDirectory(prefix="capstan-tensorboard-")
        self._events = layout.tensorboard(generation)
        self._board = None
        if writes and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(self._folder.name)
        self._flusher = Every(flush_seconds, self.flush) if writes else None

    def write(self, kind: str, **values: Any) -> None:
        if not self._writes:
            return
        self._lines.append(json.dumps({"kind": kind, **values, "time": round(time.time(), 3)}))
        if self._board is not None and kind in ("step", "eval"):
            for name, value in values.items():
                if name != "step" and not isinstance(value, str):
                    self._board.add_scalar(f"{kind}/{name}", value, values["step"])

    def flush(self) -> None:
        """Bring the store up to date."""
        if not self._writes:
            return
        lines = list(self._lines)
        self._run.put(self._key, "".join(line + "\n" for line in lines).encode())
        if self._board is not None:
            self._board.flush()
            for path in Path(self._folder.name).iterdir():
                self._run.put(self._events + path.name, path.read_bytes())

    def write_now(self, kind: str, **values: Any) -> None:
        """`write`, and bring the store up to date outside the rhythm, without waiting for it."""
        self.write(kind, **values)
        if self._flusher is not None:
            self._flusher.now()

    def close(self) -> None:
        if self._flusher is not None:
            self._flusher.stop()
            _try(self.flush)
        if self._board is not None:
            self._board.close()
        self._folder.cleanup()


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
            _try(self._action)

    def now(self) -> None:
        """Call `action` now, in the thread."""
        self._woken.set()

    def stop(self) -> None:
        self._stopped = True
        self._woken.set()
        self._thread.join()


def _try(action: Callable[[], None]) -> None:
    """Metrics and logs must never decide how a run ends."""
    try:
        action()
    except StorageError as error:
        print(f"will be tried again: {error}", file=sys.stderr)


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
        _try(send)

    try:
        yield flush
    finally:
        flusher.stop()
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        copier.join(timeout=5)  # ends when the last copy of the pipe's write end is closed
        _try(send)


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak resident memory of this process and, on a GPU, peak allocated device memory, in bytes."""
    peak = {"host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["device_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak


class Stop(IntEnum):
    """What a run is asked to do at its next step border, the stronger the higher."""

    NO = 0
    RESTART = 1  # commit, and be started again
    END = 2  # commit, and end with exit code 75


class StopSignal:
    """What somebody asked this run for: `request()` (a signal handler), the STOP or RESTART key in the run's folder, or
    `preempted()`, which tells that a machine of the run is about to leave."""

    def __init__(
        self, run: Store, *, watches: bool, seconds: float, preempted: Callable[[], bool] = lambda: False
    ) -> None:
        self._asked, self.reason = Stop.NO, "on request"
        self._run, self._preempted = run, preempted
        self._watcher = Every(seconds, self._look) if watches else None

    @property
    def requested(self) -> Stop:
        if self._asked is Stop.NO and self._preempted():
            self._asked, self.reason = Stop.RESTART, "because a machine of the run is being taken away"
        return self._asked

    def request(self) -> None:
        self._asked, self.reason = Stop.END, "on request"

    def _look(self) -> None:
        if self._run.exists(layout.STOP):
            self.request()
        elif self._asked is Stop.NO and self._run.exists(layout.RESTART):
            self._asked, self.reason = Stop.RESTART, json.loads(self._run.get(layout.RESTART))["reason"]

    def close(self) -> None:
        if self._watcher is not None:
            self._watcher.stop()
