"""Readers of the rows of binary files: Parquet, Arrow and MDS.

They are apart from the readers of text because they load pyarrow and numpy.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from trainer.data.format.formats import Row
from trainer.data.source import mds, rows, tables
from trainer.data.source.files import SourceFile
from trainer.data.source.rows import Batch, buffered
from trainer.errors import DataError


def _parquet(file: SourceFile, compression: None) -> Iterator[Batch]:
    table, first = pyarrow.parquet.ParquetFile(buffered(file)), 1
    for part in map(tables.checked, table.iter_batches(batch_size=rows.BATCH_ROWS)):
        read = file.size * (first + part.num_rows - 1) // max(1, table.metadata.num_rows)
        yield Batch(file.uri, first, tables.Table(part), read)
        first += part.num_rows


def _arrow(file: SourceFile, compression: None) -> Iterator[Batch]:
    """A file of a saved HF data set: the streaming form of Arrow's IPC format."""
    source, first, begin = buffered(file), 1, 0
    for batch in map(tables.checked, pyarrow.ipc.open_stream(source)):
        end, count = source.tell(), max(1, batch.num_rows)
        for start in range(0, count, rows.BATCH_ROWS):
            part = tables.alone(batch.slice(start, rows.BATCH_ROWS))
            yield Batch(file.uri, first, tables.Table(part), begin + (end - begin) * (start + part.num_rows) // count)
            first += part.num_rows
        begin = end


@dataclass(frozen=True)
class Samples:
    """Samples of an MDS shard with these columns."""

    columns: list[mds.Column]
    samples: list[bytes]

    def rows(self) -> Iterable[Row | DataError | None]:
        for sample in self.samples:
            try:
                yield mds.decode_sample(self.columns, sample)
            except (ValueError, RecursionError) as error:
                yield DataError(f"not a sample of its shard ({error})")

    def count(self) -> int:
        return len(self.samples)


def _mds(file: SourceFile, compression: str | None) -> Iterator[Batch]:
    source: Any = buffered(file)
    content = pyarrow.input_stream(source, compression=compression).read() if compression else source.read()
    columns, samples = mds.read_shard(content)
    for first in range(0, len(samples), rows.BATCH_ROWS):
        part = samples[first : first + rows.BATCH_ROWS]
        yield Batch(file.uri, first + 1, Samples(columns, part), file.size * (first + len(part)) // len(samples))


def parquet_rows(file: SourceFile) -> int:
    """The number of rows according to a Parquet file's footer."""
    try:
        return pyarrow.parquet.ParquetFile(buffered(file)).metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.uri}: damaged or not of the kind its name says ({error}). Replace the file.") from error


def read_binary(kind: str, file: SourceFile, compression: str | None) -> Iterator[Batch]:
    """The rows of a file of this `kind`, such as .parquet. Raises Python's errors, never pyarrow's own, if damaged."""
    try:
        yield from _READERS[kind](file, compression)
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


_READERS: dict[str, Callable[[SourceFile, Any], Iterator[Batch]]] = {
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".mds": _mds,
}
