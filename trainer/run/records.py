"""The records of a run, one JSON object a line, as anyone reads and adds to them.

The generation's rank 0 writes the stream `metrics/<generation>.jsonl` (trainer/run/metrics.py). Anyone else adds a
record as an object of its own beside it, so no two processes ever write the same object.
"""

import json
import math
import secrets
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

from trainer.errors import NOT_JSON, AlreadyExists
from trainer.run import layout
from trainer.run.segments import Appended, Segment, stored_bytes, streams
from trainer.store.store import Store

Record: TypeAlias = dict[str, Any]
_AT_ONCE_SECONDS = 600.0
T = TypeVar("T")

# The values that every reader may rely on in a record of each kind, and the types of values in records of all kinds.
_NEEDED = {
    "start": {"step"},
    **{kind: {"step"} for kind in ("step", "eval", "commit", "skip", "waiting")},
    "measured": {"step", "by"},
    "first_step": {"seconds"},
    "end": {"outcome", "reason"},
    "restart": {"reason"},
    "slow_rank": {"step", "rank", "machine"},
    "wrong_bytes": {"step", "rank", "machine", "where", "tensor", "since"},
}
PARTS = ("launch", "meet", "load", "restore")
"""The parts of a start whose seconds its record has."""
_TYPES: dict[str, Any] = {
    **dict.fromkeys(
        ("step", "epoch", "world_size", "sequence_parallel", "total_steps", "done", "in_all", "since"), int
    ),
    **dict.fromkeys(
        ("loss", "reward", "lr", "passes", "tokens", "tokens_per_second", "seconds", "time", "clock"), int | float
    ),
    **dict.fromkeys((f"{part}_seconds" for part in (*PARTS, "start")), int | float),
    **dict.fromkeys(("outcome", "reason", "device", "dashboard", "phase", "set", "by"), str),
    "machines": list,
    "rank": int,
    "ratio": int | float,
    **dict.fromkeys(("machine", "why", "where", "tensor"), str),
    **dict.fromkeys(("bytes", "stall_seconds", "read_bytes", "died_at"), int | float),
    "restored": str,
    **dict.fromkeys(("parameters", "memory_per_gpu", "memory_per_host", "shares", "data", "slowest"), dict),
}


_NO_MEASURE = {"step", "time", "clock"}
_PLACE_BYTES = 2**10
"""So much holds one or two records of steps."""


def measures(record: Record) -> dict[str, float]:
    """Return the finite numbers of a record by their names, except those that say when it was made."""
    return {
        name: value
        for name, value in record.items()
        if name not in _NO_MEASURE
        and isinstance(value, int | float)
        and not isinstance(value, bool)
        and _is_sound(value, int | float)
    }


def new_record(kind: str, values: Mapping[str, Any]) -> Record:
    """Make a record of this kind now."""
    return {"kind": kind, **values, "time": round(time.time(), 3)}


def encoded(record: Record) -> bytes:
    """Return the line of a record."""
    return json.dumps(record).encode() + b"\n"


def record_line(kind: str, values: Mapping[str, Any]) -> bytes:
    """Return the line of a record of this kind, made now."""
    return encoded(new_record(kind, values))


def _parsed(line: bytes) -> Record | None:
    """Parse the record in a line. Values of null are dropped, so readers need not tell them from missing ones.

    None stands for a record that a crash has torn, or that lacks a value on which every reader relies.
    """
    try:
        record = json.loads(line)
    except NOT_JSON:
        return None
    if not isinstance(record, dict) or not isinstance(kind := record.get("kind"), str):
        return None
    if kind == "eval":  # an evaluation without a number still replaces the one before it
        record = {name: None if _is_no_number(value) else value for name, value in record.items()}
    given = {name: value for name, value in record.items() if value is not None}
    sound = _NEEDED.get(kind, set()) <= given.keys()
    if not sound or not all(_is_sound(given[name], _TYPES[name]) for name in given.keys() & _TYPES):
        return None
    return {name: value for name, value in record.items() if value is not None or name not in _TYPES or name == "step"}


def _is_no_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _is_sound(value: Any, of: Any) -> bool:
    """Return whether the value has the type. NaN, infinity, and values that add up to them cannot be shown."""
    return isinstance(value, of) and (not isinstance(value, int | float) or abs(value) < 2**63)


class Lifetime:
    """How long a start has lasted, from the launch of its processes to its last record.

    Records of rank 0 carry the `clock` of its process, which no correction of the machine's time moves. The time of day
    counts only if no record has a clock, as in records that others have added.
    """

    def __init__(self) -> None:
        self._clocks, self._times = _Span(), _Span()
        self.ended: float | None = None
        """When the last record was made, in seconds since 1970."""

    def add(self, record: Record) -> None:
        took = record.get("start_seconds", 0.0) if record["kind"] == "start" else None
        self._clocks.add(record.get("clock"), took)
        self._times.add(record.get("time"), took)
        self.ended = record.get("time", self.ended)

    @property
    def began(self) -> float | None:
        """The time at which the processes were started, in seconds since 1970."""
        return self._times.first

    @property
    def seconds(self) -> float:
        return self._times.seconds if self._clocks.last is None else self._clocks.seconds


class _Span:
    """The time between the first and the last moment of one clock.

    The first moment is the start of the processes: the moment of the record that says so, less the seconds until then.
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self.last: float | None = None

    def add(self, moment: float | None, took: float | None) -> None:
        if moment is None:
            return
        self.last = moment if self.last is None else max(moment, self.last)
        if took is not None:
            self.first = moment - took
        elif self.first is None:
            self.first = moment

    @property
    def seconds(self) -> float:
        return 0.0 if self.last is None or self.first is None else max(0.0, self.last - self.first)


def generations(folder: Store) -> list[int]:
    """Return the numbers of the run's starts, in order."""
    numbers = (layout.generation_of(entry.key) for entry in folder.list(layout.METRICS))
    return [number for number in numbers if number is not None]


def claim_generation(folder: Store) -> int:
    """Claim the number of this start of the run, from 1.

    The claim creates the metrics, so two starts never share one.
    """
    generation = max(generations(folder), default=0) + 1
    while True:
        try:
            folder.create(layout.metrics(generation), b"")
        except AlreadyExists:
            generation += 1
        else:
            return generation


class RecordReader:
    """The records of one generation. Each look gives only the new ones, in the order in which they were written."""

    def __init__(self, folder: Store, generation: int) -> None:
        self._folder, self._generation = folder, generation
        self._streams: dict[str, Appended] = {}
        self._torn: dict[str, bytes] = defaultdict(bytes)

    def read(self, found: Mapping[str, Sequence[Segment]]) -> Iterator[Record]:
        """Yield the new records. A line that is not whole yet is left for later.

        `found` has the segments of the run's metrics, by stream.
        """
        # The generation's own stream sorts before the records that others added when its rank 0 was gone.
        for stream in _streams_of(found, self._generation):
            reader = self._streams.setdefault(stream, Appended(self._folder))
            *lines, self._torn[stream] = (self._torn[stream] + reader.read(found[stream])).split(b"\n")
            for line in lines:
                if (record := _parsed(line)) is not None:
                    yield record

    def missed(self, found: Mapping[str, Sequence[Segment]]) -> bool:
        """Return whether some of `found` could not be read because it was replaced after the listing."""
        return any(reader.position < stored_bytes(found[stream]) for stream, reader in self._streams.items())


class RunReader:
    """The records of all starts of a run. Each look gives only the new ones."""

    def __init__(self, folder: Store) -> None:
        self._folder = folder
        self._readers: dict[int, RecordReader] = {}

    def read(self, found: Mapping[str, Sequence[Segment]]) -> Iterator[tuple[int, Iterator[Record]]]:
        """Yield the number of each start in `found`, in order, with its new records.

        Records that the caller does not iterate over stay new. `found` is as for `RecordReader.read`.
        """
        for number in starts_in(found):
            reader = self._readers.setdefault(number, RecordReader(self._folder, number))
            yield number, reader.read(found)

    def misses(self, found: Mapping[str, Sequence[Segment]]) -> bool:
        """Return whether a start of which records were read is not in `found` any more: somebody removes the run.

        The caller then forgets what it has read, because another run may get the name.
        """
        return not self._readers.keys() <= set(starts_in(found))


def starts_in(found: Mapping[str, Sequence[Segment]]) -> list[int]:
    """Return the numbers of the starts that these streams have records of, in order."""
    return sorted({number for stream in found if (number := layout.records_of(stream))})


def last_written(found: Mapping[str, Sequence[Segment]], generation: int) -> float:
    """Return the time at which something was last written for a generation, in seconds since 1970."""
    written = (segment.entry.modified for stream in _streams_of(found, generation) for segment in found[stream])
    return max(written).timestamp()


def _streams_of(found: Mapping[str, Sequence[Segment]], generation: int) -> list[str]:
    return sorted(stream for stream in found if layout.records_of(stream) == generation)


def read_records(folder: Store, generation: int) -> Iterator[Record]:
    """Yield all records of a generation so far; none if it does not exist."""
    reader, found = RecordReader(folder, generation), streams(folder.list(layout.METRICS))
    yield from reader.read(found)
    if reader.missed(found):  # segments were replaced after the listing
        yield from reader.read(streams(folder.list(layout.METRICS)))


def edge_records(folder: Store, generation: int, found: Mapping[str, Sequence[Segment]], most: int) -> list[Record]:
    """Return the first and the last records of a generation, from about so many bytes of each end.

    They tell what a start is, and how far it is. `found` has the segments of the run's metrics, by stream.
    """
    text = bytearray()
    for stream in _streams_of(found, generation):
        segments, tail = found[stream], Appended(folder)
        if (size := stored_bytes(segments)) > 2 * most:
            head = folder.get_range(segments[0].entry.key, 0, min(most, segments[0].entry.size))
            text += head[: head.rfind(b"\n") + 1]
            tail.position = size - most
        last = tail.read(segments)
        text += last[last.find(b"\n") + 1 :] if size > 2 * most else last
        text += b"\n"
    return [record for line in bytes(text).split(b"\n") if (record := _parsed(line)) is not None]


def spread_records(folder: Store, generation: int, found: Mapping[str, Sequence[Segment]], places: int) -> list[Record]:
    """Return a few records from each of so many places of a generation's own stream, evenly spread over its bytes.

    They give the shape of a curve, however long it is. `found` is as for `edge_records`.
    """
    segments = found.get(layout.metrics(generation), [])
    records, size = list[Record](), stored_bytes(segments) if segments else 0
    for place in range(places):
        at = size * place // places
        segment = next((one for one in segments if one.begin <= at < one.begin + one.entry.size), None)
        if segment is not None:
            begin = at - segment.begin
            text = folder.get_range(segment.entry.key, begin, min(begin + _PLACE_BYTES, segment.entry.size))
            records += [record for line in text.split(b"\n")[1:-1] if (record := _parsed(bytes(line))) is not None]
    return records


def add_record(folder: Store, generation: int, kind: str, **values: Any) -> None:
    """Add a record to a generation whose rank 0 is not this process."""
    name = f"{time.time_ns():019d}-{secrets.token_hex(4)}"
    folder.put(layout.added_record(generation, name), record_line(kind, values))


def newest_records(folder: Store, *, after: int = 0) -> list[Record]:
    """Return the records of the run's newest start; none if no generation follows this one."""
    newest = max(generations(folder), default=0)
    return list(read_records(folder, newest)) if newest > after else []


def record_restart(folder: Store, reason: str) -> None:
    """Record in the newest generation that its end is not the end of the run."""
    if numbers := generations(folder):
        add_record(folder, numbers[-1], "restart", reason=reason)


def record_end(
    folder: Store, reason: str, *, stopped: bool = False, crash: bool = False, after: int = 0, **facts: Any
) -> None:
    """Record why the newest generation ended, unless its ranks did.

    `facts` are for programs: `lost_machine`, true if one of the run's machines left, `died`, the rank whose process
    died, and `died_at`, when it did.

    After a `crash` the record is always written: rank 0 is gone itself, or saw only a broken connection. A start that
    ended before it had a rank created no generation newer than `after`, and gets its generation here.
    """
    newest = max(generations(folder), default=0)
    if newest <= after:
        newest = after + 1
        with suppress(AlreadyExists):  # its rank 0 has just created it
            folder.create(layout.metrics(newest), b"")
    ends = [record for record in read_records(folder, newest) if record["kind"] == "end"]
    if ends and (not crash or ends[-1]["reason"] == reason):
        return
    add_record(folder, newest, "end", outcome="stopped" if stopped else "failed", step=None, reason=reason, **facts)


def record_never_begun(folder: Store, reason: str) -> None:
    """Record why a machine could not start its processes of a run.

    What the first machine says counts, because many may fail alike at once. An end of an earlier start stays.
    """
    newest = max(generations(folder), default=0)
    ends = [record for record in read_records(folder, newest) if record["kind"] == "end"] if newest else []
    if ends and ends[-1].get("never_begun") and time.time() - ends[-1].get("time", 0) < _AT_ONCE_SECONDS:
        return
    record_end(folder, reason, crash=True, after=newest if ends or not newest else newest - 1, never_begun=True)


def bad_windows(folder: Store) -> list[dict[str, int]]:
    """Return the positions whose step had a loss that was not finite, in earlier starts of the run."""
    found = []
    for generation in generations(folder):
        for record in read_records(folder, generation):
            if record["kind"] == "end" and record.get("bad_window") not in (None, *found):
                found.append(record["bad_window"])
    return found
