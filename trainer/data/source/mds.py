"""Reads a shard of MosaicML Streaming's MDS format, version 2.

A shard holds, end to end: the number of samples (uint32), samples + 1 offsets (uint32), a JSON object that describes
the columns, and the samples. A sample begins with the size (uint32) of each column of variable size. All values follow.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from trainer.data.format import strict_json

# The encodings of text data's fields. Other columns (images, pickles, ...) are left out of the row.
_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "str": lambda value: value.decode("utf-8"),
    "json": strict_json.loads,
    "int": lambda value: int.from_bytes(value, "little", signed=True),
}


@dataclass(frozen=True)
class Column:
    """A column. `size` is in bytes, or None if each sample gives its own."""

    name: str
    encoding: str
    size: int | None


def read_shard(content: bytes) -> tuple[list[Column], list[bytes]]:
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


def _columns(header: Any) -> list[Column]:
    names, encodings = _values(header, "column_names", str), _values(header, "column_encodings", str)
    sizes = _values(header, "column_sizes", int | None)
    if any((size or 0) < 0 for size in sizes):
        raise ValueError("its header gives a column a negative size")
    if len(set(names)) < len(names):
        raise ValueError("two columns have the same name")
    return [Column(*column) for column in zip(names, encodings, sizes, strict=True)]


def _values(header: Any, key: str, kind: Any) -> list[Any]:
    """The header's list under `key`, with one value for each column."""
    values = header.get(key) if isinstance(header, dict) else None
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"its header has no {key} as it should")
    return values


def decode_sample(columns: list[Column], sample: bytes) -> dict[str, Any]:
    """The columns of a sample that are text or numbers.

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
            except ValueError as error:
                raise ValueError(f"column {column.name!r} is not of the type {column.encoding}: {error}") from error
        at = end
    if at != len(sample):
        raise ValueError(f"its columns have {at} bytes together, the sample {len(sample)}")
    return row
