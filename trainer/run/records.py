"""The records of a run: `metrics/<generation>.jsonl` in its folder, one JSON object a line, as anyone reads and adds to them.

The generation's rank 0 writes its file whole, again and again (trainer/run/metrics.py); whoever adds a record does it when that
rank is gone.
"""

import json
import time
from collections.abc import Iterator
from typing import Any

from trainer.run import layout
from trainer.store import Store


def generations(run: Store) -> list[int]:
    """The numbers of the run's starts, in order."""
    numbers = (layout.generation_of(entry.key) for entry in run.list(layout.METRICS))
    return [number for number in numbers if number is not None]


def read_records(run: Store, generation: int) -> Iterator[dict[str, Any]]:
    """The whole lines of a generation's file; one torn by a crash is left out."""
    for line in run.get(layout.metrics(generation)).splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "kind" in record:
            yield record


def add_record(run: Store, generation: int, kind: str, **values: Any) -> None:
    key = layout.metrics(generation)
    line = json.dumps({"kind": kind, **values, "time": round(time.time(), 3)})
    run.put(key, run.get(key) + line.encode() + b"\n")


def bad_windows(run: Store) -> list[dict[str, int]]:
    """Positions whose step had a loss that was not finite, in earlier starts of the run."""
    found = []
    for generation in generations(run):
        for record in read_records(run, generation):
            if record["kind"] == "end" and record.get("bad_window") not in (None, *found):
                found.append(record["bad_window"])
    return found
