"""The metrics that a run writes as it goes on. Each is a record that all its trackers get: the records of one start,
lines in rank 0's own log, TensorBoard's events, and services (trainer/run/trackers/).

The records lie in the run's folder, one JSON object a line. They are the run's history, and everything else is read
from them. Events are made in memory: they need no file on the rank's machine, whose disk may be full.

The power that a GPU draws is read from NVIDIA's driver by a thread, so the training never waits for it.
"""

import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from threading import Lock
from types import SimpleNamespace
from typing import Any

import torch

from trainer.config import Config
from trainer.processes import children
from trainer.run import layout
from trainer.run.background import Every, Harmless
from trainer.run.lines import PlainLines
from trainer.run.log import tell
from trainer.run.records import Record, encoded, new_record
from trainer.run.segments import Appender, Tail
from trainer.run.trackers import Tracker, points
from trainer.run.trackers.companion import TrackerProcess
from trainer.store.store import Store

CURVES_SECONDS = 60.0
"""TensorBoard's events follow the records at this distance: people look at curves less often than at a status."""


def open_trackers(folder: Store, generation: int, config: Config, tail: Tail | None = None) -> list[Tracker]:
    """Open the trackers that `config` asks for, the records first. The end of the records is kept in `tail`.

    A tracker that cannot be opened is reported and left out.
    """
    track = config.track
    wanted: dict[str, Callable[[], Tracker]] = {
        JsonLines.name: lambda: JsonLines(folder, generation, track.flush_seconds, tail),
        Printed.name: lambda: Printed(track.print_steps),
    }
    if track.tensorboard:
        wanted[Curves.name] = lambda: Curves(folder, generation, max(track.flush_seconds, CURVES_SECONDS))
    for name in track.trackers:
        wanted[name] = partial(TrackerProcess, name, generation, config)
    opened: list[Tracker] = []
    for name, opens in wanted.items():
        Harmless(f"opening {name}")(lambda opens=opens: opened.append(opens()))
    return opened


class _Held:
    """A tracker whose calls do no harm: a failure is reported once."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._making, self._sending = Harmless(f"making {tracker.name}"), Harmless(f"sending {tracker.name}")
        self._flusher = Every(tracker.seconds, self.flush, f"sending {tracker.name}")

    def add(self, record: Record) -> None:
        self._making(lambda: self._tracker.add(record))

    def flush(self) -> None:
        self._sending(self._tracker.flush)

    def flush_soon(self) -> None:
        self._flusher.now()

    def close(self) -> None:
        self._flusher.stop()
        self._sending(self._tracker.close)


class Metrics:
    """Gives every record to the trackers. The first tracker stores them in the run's folder.

    Rank 0 has trackers. The other ranks have none, and their calls do nothing. No call fails, whatever goes wrong.
    """

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._held = [_Held(tracker) for tracker in trackers]

    def write(self, kind: str, **values: Any) -> None:
        if self._held:
            record = new_record(kind, {**values, "clock": round(time.monotonic(), 3)})
            for held in self._held:
                held.add(record)

    def flush(self) -> None:
        """Bring the store up to date."""
        for held in self._held:
            held.flush()

    def write_now(self, kind: str, **values: Any) -> None:
        """Write a record as `write` does, and bring the store up to date now, without waiting for it."""
        self.write(kind, **values)
        for held in self._held[:1]:
            held.flush_soon()

    def write_through(self, kind: str, **values: Any) -> None:
        """Write a record as `write` does. Return when it is in the store, or has failed to get there."""
        self.write(kind, **values)
        for held in self._held[:1]:
            held.flush()

    def close(self) -> None:
        """End the trackers: first the records, then all that read them, at once, because each may take a while."""
        for held in self._held[:1]:
            held.close()
        if rest := self._held[1:]:
            with ThreadPoolExecutor(len(rest)) as pool:
                list(pool.map(_Held.close, rest))


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak resident memory of this process and, on a GPU, the peak allocated device memory, in bytes."""
    peak = {"host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peak["device_peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak


_POWER_SECONDS = 10.0
_DRIVER_SECONDS = 30


class PowerMeter:
    """Reads the power of `gpu`, a UUID or a number of nvidia-smi's, every so many seconds in a thread."""

    def __init__(self, gpu: str, seconds: float) -> None:
        self._gpu, self._watts, self._lock = gpu, list[float](), Lock()
        self._reading = Every(seconds, self._read, "reading the GPU's power")
        self._reading.now()

    def measured(self) -> dict[str, float]:
        """Return `device_watts`, the mean since the last call, or nothing if there was no reading in between."""
        with self._lock:
            watts, self._watts = self._watts, []
        return {"device_watts": round(sum(watts) / len(watts), 1)} if watts else {}

    def close(self) -> None:
        self._reading.stop(wait=False)  # nvidia-smi may never answer for a GPU that is gone

    def _read(self) -> None:
        query = ["--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        command = ["nvidia-smi", f"--id={self._gpu}", *query]
        told = children.run(command, capture_output=True, text=True, timeout=_DRIVER_SECONDS, check=True).stdout
        with suppress(ValueError), self._lock:  # nvidia-smi prints "[N/A]" for a GPU that does not report it
            self._watts.append(float(told))


@contextmanager
def metered(device: torch.device, *, reads: bool) -> Iterator[Callable[[], dict[str, float]]]:
    """Yield a function that gives the result of `PowerMeter.measured` for `device`.

    It gives nothing on a CPU, without nvidia-smi, or if this rank does not read the power (`reads`).
    """
    if not reads or device.type != "cuda" or shutil.which("nvidia-smi") is None:
        yield dict
        return
    meter = PowerMeter(f"GPU-{torch.cuda.get_device_properties(device).uuid}", _POWER_SECONDS)
    try:
        yield meter.measured
    finally:
        meter.close()


class JsonLines(Tracker):
    """Stores every record. A record survives a killed rank once it is flushed, or if it is in `tail`."""

    name = "the metrics"

    def __init__(self, folder: Store, generation: int, seconds: float, tail: Tail | None = None) -> None:
        self.seconds = seconds
        self._appender = Appender(folder, layout.metrics(generation), tail)

    def add(self, record: Record) -> None:
        self._appender.append(encoded(record))

    def flush(self) -> None:
        self._appender.flush()

    def close(self) -> None:
        self._appender.close()


class Printed(Tracker):
    """Prints the line of a record at once, because a line of a log is useful when it comes.

    Every rank prints an early end itself (trainer/train/start.py).
    """

    name = "the progress"
    seconds = 3600.0

    def __init__(self, every: int) -> None:
        self._lines = PlainLines(every)

    def add(self, record: Record) -> None:
        is_early_end = record["kind"] == "end" and record["outcome"] != "finished"
        if not is_early_end and (text := self._lines.of(record)):
            tell(text)


class Curves(Tracker):
    """Writes the curves of all starts of a run into one folder, so TensorBoard shows them as one run.

    TensorBoard treats each segment as a whole events file, and reads the files in the order of their names.
    """

    name = "TensorBoard's events"

    def __init__(self, folder: Store, generation: int, seconds: float) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        messages: Any = event_pb2  # made at import, so a type checker does not see it
        self.seconds = seconds
        name = f"events.out.tfevents.{generation:06d}.{int(time.time())}.{socket.gethostname()}"
        self._appender = Appender(folder, layout.TENSORBOARD + name)
        self._event, self._session = messages.Event, messages.SessionLog
        self._writer = RecordWriter(SimpleNamespace(write=self._appender.append))
        self._writer.write(self._event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def add(self, record: Record) -> None:
        if record["kind"] == "start":
            # This is a restart: TensorBoard drops the points from this step on, which are about to come again.
            event = self._event(wall_time=record["time"], step=record["step"] + 1)
            event.session_log.status = self._session.START
        elif drawn := points(record):
            event = self._event(wall_time=record["time"], step=record["step"])
            for curve, value in drawn.items():
                event.summary.value.add(tag=curve, simple_value=value)
        else:
            return
        self._writer.write(event.SerializeToString())

    def flush(self) -> None:
        self._appender.flush()

    def close(self) -> None:
        self._appender.close()
