"""Readers of the rows of binary files: Parquet, Arrow, MDS and tars.

They are apart from the readers of text because they load pyarrow and numpy. Rows travel between processes in Arrow's
form. They are checked first, and decoded where they are used.

A shard of MosaicML Streaming's MDS format, version 2, holds, end to end: the number of samples (uint32), samples + 1
offsets (uint32), a JSON object that describes the columns, and the samples. A sample begins with the size (uint32) of
each column of variable size. All values follow.

In a tar of WebDataset the members whose names differ in their endings alone make up a sample:

    0001.jpg    a picture of the row, as 0001.wav is a sound, and 0001.mp4 a video
    0001.json   its other fields
    0002.0.png  the row has two pictures,
    0002.1.png  in this order
    0002.json   or in the order in which its fields name them: {"images": ["0002.1.png", "0002.0.png"], ...}
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from trainer.base.find.media import Modality, modalities
from trainer.data.format.formats import Row
from trainer.data.source import rows
from trainer.data.source.files import SourceFile
from trainer.data.source.rows import Batch, Decoded, buffered
from trainer.errors import NOT_JSON, DataError
from trainer.store import json_text

_MOST_BYTES = 2**28
_MEDIA = {ending: modality for modality in modalities() for ending in modality.endings}
_NAMING = {"path", "url"}.union(*((*modality.fields, *modality.parts) for modality in modalities()))


class _Sample:
    """The members of one row. `offset` is where a member begins in a file that is not compressed."""

    def __init__(self, key: str) -> None:
        self.key, self.size = key, 0
        self._row: Row = {}
        self._media: dict[str, dict[str, Any]] = {}
        self._modalities: dict[str, Modality] = {}
        self._error: DataError | None = None

    def add(self, name: str, ending: str, content: bytes, offset: int | None) -> None:
        self.size += len(content)
        kind = ending.rpartition(".")[2]
        if kind in _MEDIA:
            where = {} if offset is None else {"offset": offset}
            self._media[name] = {"bytes": content, "path": PurePosixPath(name).name, **where}
            self._modalities[name] = _MEDIA[kind]
        elif kind == "json":
            try:
                found: Any = json_text.loads(content.decode("utf-8-sig"))
            except (*NOT_JSON, json_text.TwiceNamed) as error:
                self._error = DataError(f"its member {name!r} is not JSON ({error})")
            else:
                self._row |= found if isinstance(found, dict) else {ending: found}
        elif kind in ("txt", "text", "cls"):
            self._row[ending] = content.decode("utf-8", "replace")

    def row(self) -> Row | DataError:
        if self._error is not None:
            return self._error
        names = {PurePosixPath(name).name: media for name, media in self._media.items()} | self._media
        used = set[int]()

        def own(value: Any, key: str = "") -> Any:
            """The value, with the files in place of the names of members."""
            if isinstance(value, str) and key in _NAMING and value in names:
                used.add(id(names[value]))
                return names[value]
            if isinstance(value, list):
                return [own(item, key) for item in value]
            return {name: own(item, name) for name, item in value.items()} if isinstance(value, dict) else value

        row: Row = own(self._row)
        for modality in dict.fromkeys(self._modalities.values()):
            every = [media for name, media in self._media.items() if self._modalities[name] is modality]
            rest = [media for media in every if id(media) not in used]
            if 0 < len(rest) < len(every):
                named = len(every) - len(rest)
                return DataError(f"its fields name {named} of its {len(every)} {modality.noun}s")
            row |= {modality.fields[0]: rest} if rest else {}
        return row


def samples_of_tar(file: SourceFile, compression: str | None) -> Iterator[Batch]:
    """The samples of a tar in batches. Raises Python's own errors if it is damaged."""
    source = buffered(file)
    stream: Any = source
    if compression is not None:
        import pyarrow

        stream = pyarrow.input_stream(source, compression=compression)
    first, part, size = 1, list[Row | DataError](), 0
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for sample in _samples(tar, compressed=compression is not None):
                part.append(sample.row())
                size += sample.size
                if len(part) == rows.BATCH_ROWS or size >= PORTION_BYTES:
                    yield Batch(file.uri, first, Decoded(part), source.tell())
                    first, part, size = first + len(part), [], 0
    except tarfile.TarError as error:
        raise ValueError(str(error)) from error
    if part:
        yield Batch(file.uri, first, Decoded(part), source.tell())


def _samples(tar: tarfile.TarFile, *, compressed: bool) -> Iterable[_Sample]:
    sample: _Sample | None = None
    while (member := tar.next()) is not None:
        tar.members = []  # pyright: ignore[reportAttributeAccessIssue]  # tarfile keeps all of them otherwise
        if not member.isfile():
            continue
        path = PurePosixPath(member.name)
        begin, _, ending = path.name.partition(".")
        key = str(path.with_name(begin)) if begin else ""
        if not key:
            continue  # a hidden file, such as a Mac's
        if member.size > _MOST_BYTES:
            raise ValueError(f"its member {member.name!r} has more than {_MOST_BYTES:,} bytes")
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = _Sample(key)
        content = tar.extractfile(member)
        assert content is not None
        sample.add(member.name, ending.lower(), content.read(), None if compressed else member.offset_data)
    if sample is not None:
        yield sample


PORTION_BYTES = 8 * 2**20
"""The size of a batch of rows that hold pictures, which must not be 128 times a picture's."""
_UNDECODABLE = (pyarrow.ArrowException, ValueError, KeyError, ArithmeticError, RecursionError)


def read_binary(kind: str, file: SourceFile, compression: str | None) -> Iterator[Batch]:
    """The rows of a file of this `kind`, such as .parquet. Raises Python's errors, never pyarrow's own, if damaged."""
    try:
        yield from _READERS[kind](file, compression)
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from error


def parquet_rows(file: SourceFile) -> int:
    """The number of rows according to a Parquet file's footer."""
    try:
        return pyarrow.parquet.ParquetFile(buffered(file)).metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.uri}: damaged or not of the kind its name says ({error}). Replace the file.") from error


def _parquet(file: SourceFile, compression: None) -> Iterator[Batch]:
    table, first = pyarrow.parquet.ParquetFile(buffered(file)), 1
    size, count = rows.BATCH_ROWS, table.metadata.num_rows
    if any(_holds_bytes(field.type) for field in table.schema_arrow):
        # A group of rows may have a gigabyte of pictures, which is read page by page here.
        table = pyarrow.parquet.ParquetFile(buffered(file), buffer_size=PORTION_BYTES)
        groups = range(table.metadata.num_row_groups)
        size = _fitting(count, sum(table.metadata.row_group(number).total_byte_size for number in groups))
    for part in map(checked, table.iter_batches(batch_size=size)):
        read = file.size * (first + part.num_rows - 1) // max(1, table.metadata.num_rows)
        yield Batch(file.uri, first, Table(part), read)
        first += part.num_rows


def _arrow(file: SourceFile, compression: None) -> Iterator[Batch]:
    """A file of a saved HF data set: the streaming form of Arrow's IPC format."""
    source, first, begin = buffered(file), 1, 0
    for batch in map(checked, pyarrow.ipc.open_stream(source)):
        end, count, size = source.tell(), max(1, batch.num_rows), rows.BATCH_ROWS
        if any(_holds_bytes(field.type) for field in batch.schema):
            size = _fitting(count, batch.nbytes)
        for start in range(0, count, size):
            part = alone(batch.slice(start, size))
            yield Batch(file.uri, first, Table(part), begin + (end - begin) * (start + part.num_rows) // count)
            first += part.num_rows
        begin = end


def _fitting(count: int, size: int) -> int:
    """The number of rows of a batch, of `count` rows that have `size` bytes together and hold pictures."""
    return max(1, min(rows.BATCH_ROWS, PORTION_BYTES * count // max(1, size)))


def _holds_bytes(kind: Any) -> bool:
    """Whether values of the type hold bytes or the samples of a sound, at any depth, as those of a column of pictures
    or sounds do."""
    if _TYPES.is_binary(kind) or _TYPES.is_large_binary(kind) or _TYPES.is_binary_view(kind):
        return True
    if (value := getattr(kind, "value_type", None)) is not None and _TYPES.is_floating(value):
        return True
    return any(_holds_bytes(kind.field(number).type) for number in range(kind.num_fields))


def checked(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """The batch, after checking that no offset leaves its own memory. A damaged batch would crash the process.

    Raises:
        ValueError: it is damaged, the name of a column is not text, or two columns have the same name. Single values
            may still be wrong, see `Table`.
    """
    batch.validate()
    names = batch.schema.names
    if len(set(names)) < len(names):
        raise ValueError("two columns have the same name")
    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid:
        # Text that is not UTF-8 and times that do not exist do no harm before they are decoded: check only the storage.
        for column in batch.columns:
            _as_stored(column).validate(full=True)
    return batch


def _as_stored(column: pyarrow.Array) -> pyarrow.Array:
    field = pyarrow.field("column", _stored(column.type))
    try:
        return column.cast(field.type)
    except pyarrow.ArrowNotImplementedError:
        # Arrow's messages hold raw memory, so another schema gives the same memory another type. Messages cannot hold
        # dictionaries.
        message = pyarrow.record_batch([column], ["column"]).serialize()
        return pyarrow.ipc.read_record_batch(message, pyarrow.schema([field])).column(0)


def _stored(kind: Any) -> Any:
    """The storage type of a type, at any depth: bytes for text, numbers for dates and times."""
    return next((make(kind) for is_one, make in _STORED if is_one(kind)), kind)


def _inside(field: pyarrow.Field) -> pyarrow.Field:
    return field.with_type(_stored(field.type))


_TYPES = pyarrow.types
_STORED: tuple[tuple[Callable[[Any], bool], Callable[[Any], Any]], ...] = (
    (_TYPES.is_string, lambda kind: pyarrow.binary()),
    (_TYPES.is_large_string, lambda kind: pyarrow.large_binary()),
    (_TYPES.is_string_view, lambda kind: pyarrow.binary_view()),
    (_TYPES.is_date, lambda kind: pyarrow.int32() if kind.bit_width == 32 else pyarrow.int64()),
    (_TYPES.is_time, lambda kind: pyarrow.int32() if kind.bit_width == 32 else pyarrow.int64()),
    (_TYPES.is_decimal, lambda kind: pyarrow.binary(kind.bit_width // 8)),
    (_TYPES.is_dictionary, lambda kind: pyarrow.dictionary(kind.index_type, _stored(kind.value_type))),
    (_TYPES.is_struct, lambda kind: pyarrow.struct([_inside(field) for field in kind])),
    (_TYPES.is_map, lambda kind: pyarrow.map_(_inside(kind.key_field), _inside(kind.item_field), kind.keys_sorted)),
    (_TYPES.is_fixed_size_list, lambda kind: pyarrow.list_(_inside(kind.value_field), kind.list_size)),
    (_TYPES.is_union, lambda kind: pyarrow.union([_inside(field) for field in kind], kind.mode, kind.type_codes)),
    (_TYPES.is_run_end_encoded, lambda kind: pyarrow.run_end_encoded(kind.run_end_type, _stored(kind.value_type))),
    (_TYPES.is_list, lambda kind: pyarrow.list_(_inside(kind.value_field))),
    (_TYPES.is_large_list, lambda kind: pyarrow.large_list(_inside(kind.value_field))),
    (_TYPES.is_list_view, lambda kind: pyarrow.list_view(_inside(kind.value_field))),
    (_TYPES.is_large_list_view, lambda kind: pyarrow.large_list_view(_inside(kind.value_field))),
)


@dataclass(frozen=True)
class Table:
    """Rows of a checked batch."""

    batch: pyarrow.RecordBatch

    def rows(self) -> list[dict[str, Any]] | Iterator[dict[str, Any] | DataError]:
        """Each row, or its error. Decodes row by row if a value has no form in Python, such as the year 300,000."""
        try:
            found = self.batch.to_pylist(maps_as_pydicts="strict")
        except _UNDECODABLE:
            return (_decoded(self.batch.slice(index, 1)) for index in range(self.batch.num_rows))
        nested = {field.name: field.type for field in self.batch.schema if _depth(field.type) > 1}
        for row in found if nested else ():
            row |= {name: _given(row[name], kind) for name, kind in nested.items()}
        return found

    def count(self) -> int:
        return self.batch.num_rows


def _decoded(row: pyarrow.RecordBatch) -> dict[str, Any] | DataError:
    decoded: dict[str, Any] = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            value = column[0].as_py(maps_as_pydicts="strict")
            decoded[name] = _given(value, column.type) if _depth(column.type) > 1 else value
        except _UNDECODABLE as error:
            return DataError(f"its column {name!r} cannot be read ({error})")
    return decoded


def _depth(kind: Any) -> int:
    """The largest number of structs, nested in each other, in a value of the type."""
    if _TYPES.is_map(kind):
        return _depth(kind.item_type)
    inside = max((_depth(kind.field(number).type) for number in range(kind.num_fields)), default=0)
    return inside + _TYPES.is_struct(kind)


def _given(value: Any, kind: Any) -> Any:
    """The value without the keys that Arrow added because other rows have them.

    All values of a struct type have the same keys, so a call's arguments get a null for each argument that any other
    call has. In a column with nested objects these nulls are therefore removed. A map has its own keys, and keeps them.
    """
    if isinstance(value, dict):
        if _TYPES.is_map(kind):
            return {key: _given(inside, kind.item_type) for key, inside in value.items()}
        return {key: _given(inside, kind.field(key).type) for key, inside in value.items() if inside is not None}
    return [_given(inside, kind.value_type) for inside in value] if isinstance(value, list) else value


def alone(slice_: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """A copy of the slice's rows, so that another process gets them without the rest of the batch."""
    with pyarrow.BufferOutputStream() as buffer, pyarrow.ipc.new_stream(buffer, slice_.schema) as stream:
        stream.write_batch(slice_)
    return pyarrow.ipc.open_stream(buffer.getvalue()).read_next_batch()


def _png_of_pixels(value: bytes) -> bytes:
    """A picture that MDS holds as its pixels: width, height and the size of the mode's name (uint32), mode, pixels."""
    from PIL import Image

    width, height, size = np.frombuffer(value[:12], "<u4").tolist()
    mode, pixels = value[12 : 12 + size].decode("ascii"), value[12 + size :]
    with io.BytesIO() as made:
        Image.frombytes(mode, (width, height), pixels).save(made, "PNG", compress_level=1)
        return made.getvalue()


# The encodings of fields of texts and pictures. Other columns (pickles, arrays, ...) are left out of the row.
_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "str": lambda value: value.decode("utf-8"),
    "json": json_text.loads,
    "int": lambda value: int.from_bytes(value, "little", signed=True),
    "bytes": bytes,
    "jpeg": bytes,
    "png": bytes,
    "pil": _png_of_pixels,
}
_PICTURED = ("bytes", "jpeg", "png", "pil")


@dataclass(frozen=True)
class MdsColumn:
    """A column. `size` is in bytes, or None if each sample gives its own."""

    name: str
    encoding: str
    size: int | None


@dataclass(frozen=True)
class Samples:
    """Samples of an MDS shard with these columns."""

    columns: list[MdsColumn]
    samples: list[bytes]

    def rows(self) -> Iterable[Row | DataError | None]:
        for sample in self.samples:
            try:
                yield decode_sample(self.columns, sample)
            except (ValueError, RecursionError) as error:
                yield DataError(f"not a sample of its shard ({error})")

    def count(self) -> int:
        return len(self.samples)


def _mds(file: SourceFile, compression: str | None) -> Iterator[Batch]:
    source: Any = buffered(file)
    content = pyarrow.input_stream(source, compression=compression).read() if compression else source.read()
    columns, samples = read_shard(content)
    seen = any(column.encoding in _PICTURED for column in columns)
    size = _fitting(len(samples), len(content)) if seen else rows.BATCH_ROWS
    for first in range(0, len(samples), size):
        part = samples[first : first + size]
        yield Batch(file.uri, first + 1, Samples(columns, part), file.size * (first + len(part)) // len(samples))


def read_shard(content: bytes) -> tuple[list[MdsColumn], list[bytes]]:
    """The columns and the samples of a whole shard. Raises `ValueError` if the content is not a shard."""
    count = int.from_bytes(content[:4], "little")
    offsets = np.frombuffer(content, "<u4", count + 1, offset=4).astype(np.int64)
    begin = 4 * (count + 2)
    if offsets[0] < begin or (np.diff(offsets) < 0).any():
        raise ValueError("the places of its samples are no places in a shard")
    if offsets[-1] > len(content):
        raise ValueError("it ends before its last sample")
    columns = _columns(json.loads(content[begin : offsets[0]]))
    return columns, [content[start:end] for start, end in pairwise(offsets.tolist())]


def _columns(header: Any) -> list[MdsColumn]:
    names, encodings = _values(header, "column_names", str), _values(header, "column_encodings", str)
    sizes = _values(header, "column_sizes", int | None)
    if any((size or 0) < 0 for size in sizes):
        raise ValueError("its header gives a column a negative size")
    if len(set(names)) < len(names):
        raise ValueError("two columns have the same name")
    kinds = [encoding.partition(":")[0] for encoding in encodings]  # jpeg:90 has a quality
    return [MdsColumn(*column) for column in zip(names, kinds, sizes, strict=True)]


def _values(header: Any, key: str, kind: Any) -> list[Any]:
    """The header's list under `key`, with one value for each column."""
    values = header.get(key) if isinstance(header, dict) else None
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"its header has no {key} as it should")
    return values


def decode_sample(columns: list[MdsColumn], sample: bytes) -> dict[str, Any]:
    """The columns of a sample that are text, numbers or pictures.

    Raises `ValueError` or `RecursionError` if the sample does not fit the columns.
    """
    varying = sum(column.size is None for column in columns)
    sizes = iter(np.frombuffer(sample, "<u4", varying).tolist())
    at, row = 4 * varying, {}
    for column in columns:
        end = at + (next(sizes) if column.size is None else column.size)
        if column.encoding in _DECODERS and end <= len(sample):
            try:
                row[column.name] = _DECODERS[column.encoding](sample[at:end])
            except (ValueError, OSError, LookupError) as error:
                raise ValueError(f"column {column.name!r} is not of the type {column.encoding}: {error}") from error
        at = end
    if at != len(sample):
        raise ValueError(f"its columns have {at} bytes together, the sample {len(sample)}")
    return row


_READERS: dict[str, Callable[[SourceFile, Any], Iterator[Batch]]] = {
    ".parquet": _parquet,
    ".arrow": _arrow,
    ".mds": _mds,
    ".tar": samples_of_tar,
}
