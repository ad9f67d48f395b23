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


def newest_records(run: Store) -> list[dict[str, Any]]:
    """The records of the run's newest start; none before it has one."""
    numbers = generations(run)
    return list(read_records(run, numbers[-1])) if numbers else []


def record_restart(run: Store, reason: str) -> None:
    """Say in the newest generation's records that its end is not the run's."""
    if numbers := generations(run):
        add_record(run, numbers[-1], "restart", reason=reason)


def record_end(run: Store, reason: str, *, stopped: bool = False, crash: bool = False) -> None:
    """Write why the newest generation ended into its records, unless its ranks did.

    After a `crash` in any case: rank 0 is gone itself, or saw only a broken connection. A run that ended before it had a
    rank gets its first generation here.
    """
    numbers = generations(run)
    if not numbers:
        numbers = [1]
        run.create(layout.metrics(1), b"")
    ends = [record for record in read_records(run, numbers[-1]) if record["kind"] == "end"]
    if ends and (not crash or ends[-1]["reason"] == reason):
        return
    add_record(run, numbers[-1], "end", outcome="stopped" if stopped else "failed", step=None, reason=reason)


def bad_windows(run: Store) -> list[dict[str, int]]:
    """Positions whose step had a loss that was not finite, in earlier starts of the run."""
    found = []
    for generation in generations(run):
        for record in read_records(run, generation):
            if record["kind"] == "end" and record.get("bad_window") not in (None, *found):
                found.append(record["bad_window"])
    return found
