"""The run's progress in rank 0's own log, as plain lines."""

from trainer.run.lines import PlainLines
from trainer.run.records import Record
from trainer.run.trackers.tracker import Tracker


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
