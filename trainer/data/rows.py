"""Reads the rows of a source's file, in batches that travel between processes undecoded."""

import io
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from trainer.data.sources import SourceFile, split_suffix
from trainer.errors import DataError
from trainer.store import Store

BATCH_ROWS = 128
_BATCH_BYTES = 2**20
# Of what was decompressed: so far may what is known of the place in a compressed file be ahead.
_BUFFER_BYTES = 2**18
# Longer lines are bad rows: a line is held in memory, and no sequence can keep so much text.
LONGEST_LINE = 64 * 2**20
# One request of this size keeps a bucket busy for about as long as it takes to answer.
_READ_BYTES = 8 * 2**20

Row = dict[str, Any]
OnBad = Callable[[DataError], None]


@dataclass(frozen=True)
class Batch:
    """Some rows that follow each other: lines of JSON, rows in Arrow's form, or samples of an MDS shard.

    `first` is the number of the first, from 1; `read` says how much of the file's size was read by their end, in bytes.
    """

    uri: str
    first: int
    content: "list[bytes] | pyarrow.RecordBatch | _Samples"
    read: int

    def rows(self, on_bad: OnBad) -> Iterator[tuple[str, Row]]:
        """Every row with its place, `file:line` (`file:row` where there are no lines). Empty lines are no rows.

        What is no row goes to `on_bad`, which may raise; otherwise reading goes on.
        """
        if isinstance(self.content, list):
            yield from self._lines(self.content, on_bad)
        else:
            rows = self.content.rows() if isinstance(self.content, _Samples) else self.content.to_pylist()
            yield from ((f"{self.uri}:{self.first + index}", row) for index, row in enumerate(rows))

    def _lines(self, lines: list[bytes], on_bad: OnBad) -> Iterator[tuple[str, Row]]:
        for number, line in enumerate(lines, self.first):
            if line.isspace():
                continue
            where = f"{self.uri}:{number}"
            try:
                row = _parse(line, number)
            except UnicodeDecodeError as error:
                on_bad(DataError(f"{where}: not UTF-8 ({error})"))
            except (ValueError, RecursionError) as error:
                on_bad(DataError(f"{where}: not JSON ({error})"))
            else:
                yield where, row


def batches(file: SourceFile) -> Iterator[Batch]:
    """The rows of a file, always in the same batches.

    Raises:
        DataError: the file as a whole is damaged.
        StorageError: the file cannot be read.
    """
    kind, compression = split_suffix(file.key)
    try:
        match kind:
            case ".jsonl":
                yield from _json_lines(file, compression)
            case ".parquet":
                yield from _parquet(file)
            case ".arrow":
                yield from _arrow(file)
            case ".mds":
                yield from _mds(file, compression)
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"{file.uri}: damaged or not of the kind its name says ({error}). Replace the file.") from error


def rows(file: SourceFile, on_bad: OnBad) -> Iterator[tuple[str, Row]]:
    """Every row of a file; see `Batch.rows` and `batches`."""
    for batch in batches(file):
        yield from batch.rows(on_bad)


def _parse(line: bytes, number: int) -> Row:
    if len(line) > LONGEST_LINE:
        raise ValueError(f"the line has more than {LONGEST_LINE:,} bytes")
    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    if not isinstance(row, dict):
        raise ValueError(f"an object is needed, this is {type(row).__name__}")
    return row


def _json_lines(file: SourceFile, compression: str | None) -> Iterator[Batch]:
    source = _buffered(file)
    stream = pyarrow.input_stream(source, compression=compression)
    # pyarrow's streams are raw streams in all but their declared type; its own readline is a Python loop.
    buffered = io.BufferedReader(stream, _BUFFER_BYTES)  # pyright: ignore[reportArgumentType]
    number, lines, size, before = 1, [], 0, 0

    def read() -> int:
        # Of what is compressed no more is known than how much went into the decompression, which is a little ahead.
        return source.tell() if compression else before + size

    for line in _bounded_lines(buffered):
        lines.append(line)
        size += len(line)
        if len(lines) == BATCH_ROWS or size >= _BATCH_BYTES:
            yield Batch(file.uri, number, lines, read())
            number, before, lines, size = number + len(lines), before + size, [], 0
    if lines:
        yield Batch(file.uri, number, lines, read())


def _bounded_lines(stream: io.BufferedReader) -> Iterator[bytes]:
    """Lines, of which one that is longer than is allowed comes with a byte too many and without its rest."""
    while line := stream.readline(LONGEST_LINE + 1):
        yield line
        while len(line) > LONGEST_LINE and not line.endswith(b"\n"):
            line = stream.readline(LONGEST_LINE + 1)


def _parquet(file: SourceFile) -> Iterator[Batch]:
    table, first = pyarrow.parquet.ParquetFile(_buffered(file)), 1
    for part in table.iter_batches(batch_size=BATCH_ROWS):
        yield Batch(file.uri, first, part, file.size * (first + part.num_rows - 1) // max(1, table.metadata.num_rows))
        first += part.num_rows


def _arrow(file: SourceFile) -> Iterator[Batch]:
    """A file of a saved HF data set: the streaming form of Arrow's IPC format."""
    source, first, begin = _buffered(file), 1, 0
    for batch in pyarrow.ipc.open_stream(source):
        end, count = source.tell(), max(1, batch.num_rows)
        for start in range(0, count, BATCH_ROWS):
            # Through its serialized form, as a slice takes all of the batch along when it goes to another process.
            slice_ = batch.slice(start, BATCH_ROWS)
            part = pyarrow.ipc.read_record_batch(slice_.serialize(), slice_.schema)
            yield Batch(file.uri, first, part, begin + (end - begin) * (start + part.num_rows) // count)
            first += part.num_rows
        begin = end


@dataclass(frozen=True)
class _Samples:
    """Samples of an MDS shard. `columns` are (name, encoding, size in bytes or None where each sample says it)."""

    columns: list[tuple[str, str, int | None]]
    samples: list[bytes]

    def rows(self) -> Iterator[Row]:
        return map(self._decode, self.samples)

    def _decode(self, sample: bytes) -> Row:
        """Sizes of the columns that vary (uint32 each), then all values end to end."""
        at = 4 * sum(size is None for _, _, size in self.columns)
        varying = iter(np.frombuffer(sample[:at], "<u4").tolist())
        row = {}
        for name, encoding, size in self.columns:
            end = at + (next(varying) if size is None else size)
            if encoding in _MDS_DECODERS:
                row[name] = _MDS_DECODERS[encoding](sample[at:end])
            at = end
        return row


# What fields of text data are written as. Other columns (images, pickles, ...) are left out of the row.
_MDS_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "str": lambda value: value.decode("utf-8"),
    "json": json.loads,
    "int": lambda value: int.from_bytes(value, "little", signed=True),
}


def _mds(file: SourceFile, compression: str | None) -> Iterator[Batch]:
    """A shard of MosaicML Streaming's MDS format, version 2.

    uint32 samples, uint32 offsets (samples + 1 of them), a JSON object that describes the columns, the samples.
    """
    source: Any = _buffered(file)
    content = pyarrow.input_stream(source, compression=compression).read() if compression else source.read()
    count = int.from_bytes(content[:4], "little")
    offsets = np.frombuffer(content, "<u4", count + 1, offset=4).tolist()
    header = json.loads(content[4 * (count + 2) : offsets[0]])
    columns = list(zip(header["column_names"], header["column_encodings"], header["column_sizes"], strict=True))
    if offsets[-1] > len(content):
        raise ValueError("it ends before its last sample")
    samples = [content[begin:end] for begin, end in itertools.pairwise(offsets)]
    for first in range(0, count, BATCH_ROWS):
        part = samples[first : first + BATCH_ROWS]
        read = file.size * (first + len(part)) // count
        yield Batch(file.uri, first + 1, _Samples(columns, part), read)


class ObjectReader(io.RawIOBase):
    """An object as a seekable file: each `readinto` is one ranged read."""

    def __init__(self, file: SourceFile) -> None:
        self._store: Store = file.store
        self._key = file.key
        self._size = file.size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._position + len(view), self._size)
        data = self._store.get_range(self._key, self._position, max(end, self._position))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


def _buffered(file: SourceFile) -> io.BufferedReader:
    return io.BufferedReader(ObjectReader(file), _READ_BYTES)
