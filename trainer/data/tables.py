"""Rows in Arrow's form: which can be looked at safely, how they travel, and how they are decoded."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow

from trainer.errors import DataError

_UNDECODABLE = (pyarrow.ArrowException, ValueError, ArithmeticError, RecursionError)


def checked(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """The batch, in which nothing points at memory that is not its own: a damaged one would end the process.

    Raises:
        ValueError: it is damaged, or the name of a column is no text. Single values may still be wrong, see `Table`.
    """
    batch.validate()
    _ = batch.schema.names
    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid:
        # Text that is not UTF-8 and times that do not exist harm nobody before they are decoded.
        raw = pyarrow.schema([field.with_type(_stored(field.type)) for field in batch.schema])
        batch.cast(raw).validate(full=True)
    return batch


def _stored(kind: Any) -> Any:
    """The type that the same memory has at any depth without its meaning: bytes for text, numbers for dates and times."""
    types = pyarrow.types
    if types.is_string(kind):
        return pyarrow.binary()
    if types.is_large_string(kind):
        return pyarrow.large_binary()
    if types.is_string_view(kind):
        return pyarrow.binary_view()
    if types.is_date(kind) or types.is_time(kind):
        return pyarrow.int32() if kind.bit_width == 32 else pyarrow.int64()
    if types.is_dictionary(kind):
        return pyarrow.dictionary(kind.index_type, _stored(kind.value_type))
    if types.is_struct(kind):
        return pyarrow.struct([field.with_type(_stored(field.type)) for field in kind])
    if types.is_list(kind) or types.is_large_list(kind):
        make = pyarrow.list_ if types.is_list(kind) else pyarrow.large_list
        return make(kind.value_field.with_type(_stored(kind.value_type)))
    return kind


@dataclass(frozen=True)
class Table:
    """Rows of a checked batch."""

    batch: pyarrow.RecordBatch

    def rows(self) -> list[dict[str, Any]] | Iterator[dict[str, Any] | DataError]:
        """Each row, or what is wrong with it; one by one where a value has no form in Python, such as the year 300,000."""
        try:
            return self.batch.to_pylist()
        except _UNDECODABLE:
            return (_decoded(self.batch.slice(index, 1)) for index in range(self.batch.num_rows))

    def with_key(self, key: str) -> "Table":
        """All rows, or none where no column has a field of this name."""
        return self if any(key in str(field.type) for field in self.batch.schema) else Table(self.batch.slice(0, 0))


def _decoded(row: pyarrow.RecordBatch) -> dict[str, Any] | DataError:
    decoded: dict[str, Any] = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            decoded[name] = column[0].as_py()
        except _UNDECODABLE as error:
            return DataError(f"its column {name!r} cannot be read ({error})")
    return decoded


def alone(slice_: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """The same rows, which go to another process without the rest of the batch that they are a slice of."""
    with pyarrow.BufferOutputStream() as buffer, pyarrow.ipc.new_stream(buffer, slice_.schema) as stream:
        stream.write_batch(slice_)
    return pyarrow.ipc.open_stream(buffer.getvalue()).read_next_batch()
