"""Finds the files that documents come from, and reads them row by row, wherever they lie."""

import fnmatch
import glob
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow
import pyarrow.parquet

from trainer.config import Source
from trainer.errors import DataError, StorageError
from trainer.store import Store, open_store

_COMPRESSION = {".jsonl": None, ".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}
_PARQUET = ".parquet"
_SUFFIXES = (*_COMPRESSION, _PARQUET)
_SCHEMES = ("file", "s3", "gs", "az")
_WILDCARDS = frozenset("*?[")
# One request of this size keeps a bucket busy for about as long as it takes to answer.
_READ_BYTES = 8 * 2**20
_PARQUET_ROWS = 1024


@dataclass(frozen=True)
class SourceFile:
    """A file of a source: `uri` is its name in messages, `size` is in bytes, `source` the index of its source.

    `version` changes when the content does.
    """

    uri: str
    store: Store
    key: str
    size: int
    version: str
    source: int


def expand(sources: Sequence[Source], setting: str) -> list[SourceFile]:
    """The files of all sources, in the order of the sources and by name inside each.

    `setting` is what messages call the list, such as `data.train`.

    Raises:
        DataError: a path does not exist, matches nothing, or is of a kind that cannot be read.
    """
    files = []
    for index, source in enumerate(sources):
        name = f"{setting}[{index}].path"
        found = _find(source.path, index, name)
        if not found:
            raise DataError(f"{name}: {source.path!r} matches no file. Name a file or a glob that exists.")
        for file in found:
            if _suffix(file.key) is None:
                raise DataError(f"{name}: {file.uri} cannot be read. Allowed are {', '.join(_SUFFIXES)}.")
        files += found
    return files


def rows(file: SourceFile, on_bad: Callable[[DataError], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row of a file with its place, `file:line` (for Parquet `file:row`), counted from 1. Empty lines are no rows.

    A line that is not a JSON object in UTF-8 goes to `on_bad`, which may raise; otherwise reading goes on.

    Raises:
        DataError: the file as a whole is damaged.
        StorageError: the file cannot be read.
    """
    try:
        yield from _parquet_rows(file) if _suffix(file.key) == _PARQUET else _json_rows(file, on_bad)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.uri}: damaged or not of the kind its name says ({error}). Replace the file.") from error


def _json_rows(file: SourceFile, on_bad: Callable[[DataError], None]) -> Iterator[tuple[str, dict[str, Any]]]:
    compression = _COMPRESSION[_suffix(file.key) or ".jsonl"]
    stream = pyarrow.input_stream(_open(file), compression=compression)
    # pyarrow's streams are raw streams in all but their declared type; its own readline is a Python loop.
    lines = io.BufferedReader(stream, _READ_BYTES)  # pyright: ignore[reportArgumentType]
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        where = f"{file.uri}:{number}"
        try:
            row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            on_bad(DataError(f"{where}: not JSON ({error})"))
            continue
        if isinstance(row, dict):
            yield where, row
        else:
            on_bad(DataError(f"{where}: not JSON (an object is needed, this is {type(row).__name__})"))


def _parquet_rows(file: SourceFile) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    for batch in pyarrow.parquet.ParquetFile(_open(file)).iter_batches(batch_size=_PARQUET_ROWS):
        for row in batch.to_pylist():
            number += 1
            yield f"{file.uri}:{number}", row


def _suffix(key: str) -> str | None:
    return next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)


def _find(path: str, source: int, name: str) -> list[SourceFile]:
    scheme = urlsplit(path).scheme if "://" in path else "file"
    if scheme not in _SCHEMES:
        allowed = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        raise DataError(f"{name}: {path!r} has the scheme {scheme!r}. Allowed are a local path, or {allowed}.")
    return _find_local(path, source, name) if scheme == "file" else _find_remote(path, source, name)


def _find_local(path: str, source: int, name: str) -> list[SourceFile]:
    local = Path(unquote(urlsplit(path).path) if "://" in path else path).expanduser()
    # A name with brackets in it may be a file, and not a pattern.
    if local.exists():
        matches = [local]
    elif _WILDCARDS & set(str(local)):
        matches = [match for match in map(Path, sorted(glob.glob(str(local), recursive=True))) if match.is_file()]
    else:
        raise DataError(f"{name}: {path!r} does not exist. Name a file or a glob that exists.")
    if local.is_dir():
        raise DataError(f"{name}: {path!r} is a folder. Name its files, for example {path.rstrip('/')}/*.jsonl.")
    files = []
    for match in matches:
        store = open_store(str(match.parent))
        entry = store.head(match.name)
        files.append(SourceFile(str(match), store, match.name, entry.size, entry.version, source))
    return files


def _find_remote(path: str, source: int, name: str) -> list[SourceFile]:
    folder, _, pattern = path.rpartition("/")
    if _WILDCARDS & set(folder):
        raise DataError(f"{name}: {path!r} has a wildcard in a folder. In a bucket only the last part may have one.")
    store = open_store(folder)
    try:
        if _WILDCARDS & set(pattern):
            entries = [entry for entry in store.list() if "/" not in entry.key]
            entries = [entry for entry in entries if fnmatch.fnmatchcase(entry.key, pattern)]
        else:
            entries = [store.head(pattern)]
    except StorageError as error:
        raise DataError(f"{name}: {path!r} cannot be read: {error}") from error
    return [SourceFile(f"{folder}/{e.key}", store, e.key, e.size, e.version, source) for e in entries]


class _ObjectReader(io.RawIOBase):
    """An object as a seekable file: each `readinto` is one ranged read."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._position = 0

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


def _open(file: SourceFile) -> io.BufferedReader:
    return io.BufferedReader(_ObjectReader(file), _READ_BYTES)
