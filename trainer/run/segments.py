"""Streams that grow in a store that cannot append: metrics, logs and TensorBoard's events.

A stream lies in segments. The first segment has the stream's own key. Each other segment has that key and the position
of its first byte: `rank-00003.log`, then `rank-00003.log.000001048576`. The newest bytes are in a short segment. It is
written again, with more bytes, up to `SHORT_WRITES` times, and then closed. When a block of `BLOCK_BYTES` is complete,
it replaces its short segments as one segment and is never written again. So the writer keeps one block in memory. A
byte is written about `SHORT_WRITES / 2 + 1` times however long the stream is, and there are few segments to list.

A reader uses positions alone: segments may overlap for the moment in which a block replaces short ones. People can
print a stream with `cat KEY*` when nobody is writing it.
"""

import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

from trainer.errors import NotFound
from trainer.run.background import say
from trainer.store.store import Entry, Store

BLOCK_BYTES = 2**20
SHORT_WRITES = 8
LIMIT_BYTES = 8 * BLOCK_BYTES
"""The most that a stream keeps in memory while its store does not answer; later bytes are lost, and counted."""
_READS_AT_A_TIME = 16
_SEGMENT = re.compile(r"(.+)\.(\d{12})")


class Segment(NamedTuple):
    """Bytes [begin, begin + entry.size) of a stream."""

    begin: int
    entry: Entry


def _key(stream: str, begin: int) -> str:
    return f"{stream}.{begin:012d}" if begin else stream


def streams(entries: Iterable[Entry]) -> dict[str, list[Segment]]:
    """Return the segments in a listing by their stream's key, in order."""
    found: dict[str, list[Segment]] = defaultdict(list)
    for entry in entries:
        match = _SEGMENT.fullmatch(entry.key)
        stream, begin = (match[1], int(match[2])) if match else (entry.key, 0)
        found[stream].append(Segment(begin, entry))
    return {stream: sorted(segments, key=lambda segment: segment.begin) for stream, segments in found.items()}


def stored_bytes(segments: Sequence[Segment]) -> int:
    """Return the bytes of the stream that has these segments."""
    return max(begin + entry.size for begin, entry in segments)


class Tail:
    """The end of a stream, from the position `begin` on, in a file that outlives the process (`trainer.state.kept`)."""

    def __init__(self, file: int) -> None:
        self._file, self._end = file, 0

    def start(self, stream: str, begin: int, data: bytes = b"") -> None:
        """Keep `data`, and what will be added to it, in place of what is there."""
        os.ftruncate(self._file, 0)
        self._end = os.pwrite(self._file, f"{begin} {stream}\n".encode() + data, 0)

    def add(self, data: bytes) -> None:
        self._end += os.pwrite(self._file, data, self._end)

    def found(self) -> tuple[str, int, bytes] | None:
        """Return the stream, `begin` and the bytes; None if there is nothing."""
        data = os.pread(self._file, os.fstat(self._file).st_size, 0)
        head, line, rest = data.partition(b"\n")
        if not line:
            return None
        begin, _, stream = head.decode().partition(" ")
        return stream, int(begin), rest


class Appender:
    """Writes one stream from its first byte on. `append` is cheap and never waits for the store. `flush` writes.

    `tail` outlives this process, so that `store_tail` can write what is not in the store when the process is killed.
    """

    def __init__(self, folder: Store, stream: str, tail: Tail | None = None) -> None:
        self._folder, self._stream, self._tail = folder, stream, tail
        if tail is not None:
            tail.start(stream, 0)
        self._block, self._begin = bytearray(), 0  # the stream from `_begin` on
        self._stored = 0  # this many bytes of the block are in the store
        self._short, self._writes = 0, 0  # where in the block the open segment begins, and how often it was written
        self._closed: list[str] = []  # the short segments of this block after its first
        self._covered: list[str] = []  # the short segments of the block before, which has replaced them
        self._lost = 0
        self._appending, self._flushing = threading.Lock(), threading.Lock()

    @property
    def unsent(self) -> int:
        """The bytes that are not in the store yet."""
        return len(self._block) - self._stored

    def append(self, data: bytes) -> None:
        with self._appending:
            if len(self._block) + len(data) > LIMIT_BYTES:
                self._lost += len(data)
            else:
                self._block += data
                if self._tail is not None:
                    self._tail.add(data)

    def flush(self) -> None:
        """Bring the store up to date. Writes nothing if nothing is new. Raises `StorageError`."""
        with self._flushing:
            size = len(self._block)
            if size >= BLOCK_BYTES:
                self._write_block(size)
            elif size > self._stored:
                self._write_short(size)
            while self._covered:
                self._folder.delete(self._covered[-1])
                self._covered.pop()
            if self._lost:
                say(f"{self._lost} bytes of {self._stream} are lost: the store did not answer for too long.")
                self._lost = 0

    def close(self) -> None:
        """Flush the stream for the last time, with the last bytes as one segment too."""
        with self._flushing:
            if self._closed:
                self._write_block(len(self._block))
        self.flush()

    def _write_short(self, size: int) -> None:
        if self._writes == SHORT_WRITES:
            self._short, self._writes = self._stored, 0
            self._closed.append(_key(self._stream, self._begin + self._short))
        self._folder.put(_key(self._stream, self._begin + self._short), self._bytes(self._short, size))
        self._stored, self._writes = size, self._writes + 1

    def _write_block(self, size: int) -> None:
        self._folder.put(_key(self._stream, self._begin), self._bytes(0, size))
        with self._appending:
            del self._block[:size]
            self._begin, self._stored, self._short, self._writes = self._begin + size, 0, 0, 0
            if self._tail is not None:
                self._tail.start(self._stream, self._begin, bytes(self._block))
        self._covered += self._closed
        self._closed = []

    def _bytes(self, begin: int, end: int) -> bytes:
        with self._appending:
            return bytes(memoryview(self._block)[begin:end])


def store_tail(folder: Store, tail: Tail) -> None:
    """Write to the store what a killed process had appended to its stream and not written. Raises `StorageError`."""
    found = tail.found()
    if found is None:
        return
    stream, begin, data = found
    segments = streams(folder.list(stream[: stream.rfind("/") + 1])).get(stream)
    end = stored_bytes(segments) if segments else 0
    if end < begin + len(data):
        folder.put(_key(stream, end), data[max(0, end - begin) :])


class Appended:
    """Reads only the bytes of one stream that were appended after the last look."""

    def __init__(self, folder: Store) -> None:
        self._folder = folder
        self.position = 0

    def read(self, segments: Sequence[Segment]) -> bytes:
        """Read the bytes beyond `position` in the stream's `segments`, as of a listing.

        Bytes of objects that have gone since the listing come with the next look.
        """
        wanted, position = [], self.position
        for begin, entry in segments:
            end = begin + entry.size
            if begin <= position < end:
                wanted.append((entry.key, position - begin, entry.size))
                position = end
        data = bytearray()
        with suppress(NotFound), ThreadPoolExecutor(_READS_AT_A_TIME) as pool:
            for part in pool.map(lambda asked: self._folder.get_range(*asked), wanted):
                data += part
        self.position += len(data)
        return bytes(data)


def read_stream(folder: Store, prefix: str, stream: str) -> bytes:
    """Read the whole stream, by listings of the folder `prefix` that it is in. Raises `NotFound`."""
    reader, data = Appended(folder), bytearray()
    while True:
        segments = streams(folder.list(prefix)).get(stream)
        if segments is None:
            raise NotFound(f"{folder.uri}/{stream} does not exist.")
        data += (part := reader.read(segments))
        if not part or reader.position == stored_bytes(segments):
            return bytes(data)
