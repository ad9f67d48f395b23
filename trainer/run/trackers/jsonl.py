"""The records of one generation in the run's folder, one JSON object a line.

They are the run's history. Everything else is read from them.
"""

from trainer.run import layout
from trainer.run.records import Record, encoded
from trainer.run.segments import Appender
from trainer.run.trackers.tracker import Tracker
from trainer.store.store import Store


class JsonLines(Tracker):
    """Stores every record. A record survives a killed rank once it is flushed."""

    name = "the metrics"

    def __init__(self, folder: Store, generation: int, seconds: float) -> None:
        self.seconds = seconds
        self._appender = Appender(folder, layout.metrics(generation))

    def add(self, record: Record) -> None:
        self._appender.append(encoded(record))

    def flush(self) -> None:
        self._appender.flush()

    def close(self) -> None:
        self._appender.close()
