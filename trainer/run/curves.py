"""TensorBoard's events of one generation, made in memory: they need no file on the rank's machine, which may be full."""

import socket
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from trainer.run import layout
from trainer.run.segments import Appender
from trainer.store import Store


class Curves:
    """Each number of a record as a point of the curve `<kind>/<name>`. A segment is a whole events file to TensorBoard."""

    def __init__(self, folder: Store, generation: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter

        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._appender = Appender(folder, layout.tensorboard(generation) + name)
        self._event, self._writer = Event, RecordWriter(SimpleNamespace(write=self._appender.append))
        self._writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def add(self, kind: str, values: Mapping[str, Any]) -> None:
        """`values` has the `step` that the others belong to; a text is no point."""
        event = self._event(wall_time=time.time(), step=values["step"])
        for name, value in values.items():
            if name != "step" and not isinstance(value, str):
                event.summary.value.add(tag=f"{kind}/{name}", simple_value=value)
        self._writer.write(event.SerializeToString())

    def flush(self) -> None:
        self._appender.flush()

    def close(self) -> None:
        self._appender.close()
