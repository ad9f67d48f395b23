"""Trackers that need no service: the records of one generation, lines in rank 0's own log, and TensorBoard's events.

The records lie in the run's folder, one JSON object a line. They are the run's history, and everything else is read
from them. Events are made in memory: they need no file on the rank's machine, whose disk may be full.
"""

import socket
import time
from types import SimpleNamespace
from typing import Any

from trainer.run import layout
from trainer.run.lines import PlainLines
from trainer.run.records import Record, encoded
from trainer.run.segments import Appender, Tail
from trainer.run.trackers import Tracker, points
from trainer.store.store import Store


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
            print(text, flush=True)


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
