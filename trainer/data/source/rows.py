"""Batches of a file's rows, which travel between processes undecoded, and the readers of text files.
trainer/data/source/binary_rows.py has the readers of binary files.
"""

import codecs
import csv
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from trainer.data.format.formats import Row, RowForm
from trainer.data.source.files import SourceFile
from trainer.errors import NOT_JSON, DataError
from trainer.store import json_text
from trainer.store.json_text import elements

BATCH_ROWS = 128
_BATCH_BYTES = 2**20
# In a compressed file the reported position may run ahead by this many decompressed bytes.
_BUFFER_BYTES = 2**18
# Enough bytes to tell a JSON array from rows in lines.
_BEGINNING = 2**12
# Longer lines are bad rows: a line is held in memory, and no sequence is that long.
LONGEST_LINE = 64 * 2**20
# A request of this size transfers for about as long as a bucket takes to begin its answer.
_READ_BYTES = 8 * 2**20
# Enough for a sentence with a few names from the row in it.
_LONGEST_REASON = 400


OnBad = Callable[["BadRow"], None]


class Content(Protocol):
    """Rows, undecoded if possible: some lines of JSON, a part of an Arrow table, or samples of an MDS shard."""

    def rows(self) -> Iterable[Row | DataError | None]:
        """Yield each row, or the error of a bad row, or None in a place without a row."""
        ...

    def count(self) -> int:
        """The number of rows, including bad ones. Decodes none."""
        ...


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of a file.

    `first` is the number of the first row, from 1. `read` is the number of the file's bytes that were read by their
    end. `form` is that of the file's source.
    """

    uri: str
    first: int
    content: Content
    read: int
    form: RowForm | None = None

    def rows(self, on_bad: OnBad) -> Iterator[tuple[str, Row]]:
        """Yield every row with its place, `file:line` (`file:row` if the file has no lines). Skips empty lines.

        A bad row goes to `on_bad`, which may raise; otherwise reading goes on.
        """
        for number, row in enumerate(self.content.rows(), self.first):
            where = f"{self.uri}:{number}"
            if isinstance(row, DataError):
                on_bad(at(where, row))
            elif row is not None and not (self.form and self.form.leaves_out(row)):
                yield where, row


class BadRow(DataError):
    """A row that cannot be used, with its place and the reason."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where, self.reason = where, reason


def at(where: str, error: DataError) -> BadRow:
    """The error of a row with its place, as one line."""
    return BadRow(where, printable(str(error)))


def printable(text: str) -> str:
    """`text` on one line and shortened, because rows bring any character and names of any length."""
    shown = text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in shown)


def _text(line: str) -> Row | DataError:
    return {"text": line.rstrip("\r\n")}


def _object(line: str) -> Row | DataError:
    try:
        row = json_text.loads(line)
    except json_text.TwiceNamed as error:
        return DataError(str(error))
    except NOT_JSON as error:
        return DataError(f"not JSON ({error})")
    return row if isinstance(row, dict) else _no_object(row)


@dataclass(frozen=True)
class Lines:
    """Lines of a file, with their line ends. `row` makes a row of a line.

    `begins` says whether the first line is the first of the file.
    """

    lines: list[bytes]
    begins: bool
    row: Callable[[str], Row | DataError] = _object

    def rows(self) -> Iterable[Row | DataError | None]:
        for index, line in enumerate(self.lines):
            yield self._read(line.removeprefix(codecs.BOM_UTF8) if self.begins and not index else line)

    def _read(self, line: bytes) -> Row | DataError | None:
        if not line or line.isspace():
            return None
        if len(line) > LONGEST_LINE:
            return DataError(f"the line has more than {LONGEST_LINE:,} bytes")
        try:
            return self.row(line.decode())
        except UnicodeDecodeError as error:
            return DataError(f"not UTF-8 ({error})")

    def count(self) -> int:
        return sum(not line.isspace() for line in self.lines)


def _no_object(element: Any) -> DataError:
    return DataError(f"not JSON (an object is needed, this is {type(element).__name__})")


def _lines(
    file: SourceFile, compression: str | None, row: Callable[[str], Row | DataError] = _object
) -> Iterator[Batch]:
    source = buffered(file)
    stream = io.BufferedReader(_decompressed(source, compression), _BUFFER_BYTES)
    lines = ((line, len(line)) for line in _bounded_lines(stream))
    for first, part, read in _portions(lines):
        # Decompression reads ahead of the lines, so in a compressed file the position is a little too large.
        yield Batch(file.uri, first, Lines(part, first == 1, row), source.tell() if compression else read)


@dataclass(frozen=True)
class Decoded:
    """Rows that had to be decoded to be separated. An element of an array may also be no row."""

    elements: list[Any]

    def rows(self) -> Iterable[Row | DataError | None]:
        for element in self.elements:
            yield element if isinstance(element, dict | DataError) else _no_object(element)

    def count(self) -> int:
        return len(self.elements)


def _json(file: SourceFile, compression: str | None) -> Iterator[Batch]:
    """A JSON file is an array of rows if it begins with one. Otherwise it has one row in each line."""
    stream = _decompressed(buffered(file), compression)
    if not stream.read(_BEGINNING).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return _lines(file, compression)
    source = buffered(file)
    stream = _decompressed(source, compression)
    return _gathered(file, source, elements(stream.read, LONGEST_LINE))


def _separated(file: SourceFile, compression: str | None, delimiter: str) -> Iterator[Batch]:
    """Text rows whose fields the first line names (RFC 4180: a value in quotes may hold line breaks)."""
    source = buffered(file)
    stream = io.BufferedReader(_decompressed(source, compression), _BUFFER_BYTES)
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    csv.field_size_limit(LONGEST_LINE)
    records = csv.reader(text, delimiter=delimiter, strict=True)
    header = next(records, [])
    if len(set(header)) != len(header):
        raise ValueError("two columns have the same name")
    rows = ((_record(header, values), sum(map(len, values))) for values in records if values)
    return _gathered(file, source, rows)


def _record(header: list[str], values: list[str]) -> Row | DataError:
    if len(values) != len(header):
        return DataError(f"{len(values)} values in a row of {len(header)} columns; quote those that hold a delimiter")
    return dict(zip(header, values, strict=True))


def _gathered(file: SourceFile, source: io.BufferedReader, elements: Iterable[tuple[Any, int]]) -> Iterator[Batch]:
    """The elements, each with its size, in batches. The position of `source` is their end or a little more."""
    for first, part, _ in _portions(elements):
        yield Batch(file.uri, first, Decoded(part), source.tell())


def _portions(items: Iterable[tuple[Any, int]]) -> Iterator[tuple[int, list[Any], int]]:
    """Divide the items, each with its size, into portions for a batch.

    Yields the number of the portion's first item, from 1, the portion, and the size of all items up to its end.
    """
    first, portion, size, before = 1, [], 0, 0
    for item, more in items:
        portion.append(item)
        size += more
        if len(portion) == BATCH_ROWS or size >= _BATCH_BYTES:
            yield first, portion, before + size
            first, before, portion, size = first + len(portion), before + size, [], 0
    if portion:
        yield first, portion, before + size


def _bounded_lines(stream: io.BufferedReader) -> Iterator[bytes]:
    """Yield all lines. A line over the limit is cut one byte above it, and its rest is skipped."""
    while line := stream.readline(LONGEST_LINE + 1):
        yield line
        while len(line) > LONGEST_LINE and not line.endswith(b"\n"):
            line = stream.readline(LONGEST_LINE + 1)


class ObjectReader(io.RawIOBase):
    """An object as a seekable file. Each `readinto` is one ranged read."""

    def __init__(self, file: SourceFile) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._position + len(view), self._file.size)
        data = self._file.store.get_range(self._file.key, self._position, max(end, self._position))
        view[: len(data)] = data
        self._position += len(data)
        return len(data)


def buffered(file: SourceFile) -> io.BufferedReader:
    """A file's bytes as they are stored."""
    return io.BufferedReader(ObjectReader(file), _READ_BYTES)


class _Uncompressed(io.RawIOBase):
    """The bytes of a file, unchanged. Closing it leaves the file open, because the file's position is read last."""

    def __init__(self, source: io.BufferedReader) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._source.readinto(buffer)


def _decompressed(source: io.BufferedReader, compression: str | None) -> Any:
    """A raw stream of the text in a file. Closing the stream leaves the file open."""
    if compression is None:
        return _Uncompressed(source)
    # Import pyarrow only for compressed files: `plan` looks at the first rows too, and answers sooner without it.
    import pyarrow

    return pyarrow.input_stream(source, compression=compression)


TEXTS: dict[str, Callable[[SourceFile, Any], Iterator[Batch]]] = {
    ".jsonl": _lines,
    ".json": _json,
    ".csv": partial(_separated, delimiter=","),
    ".tsv": partial(_separated, delimiter="\t"),
    ".txt": partial(_lines, row=_text),
}
"""The reader of each kind of text; it gets a file and its compression."""
