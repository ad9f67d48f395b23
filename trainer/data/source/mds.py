"""Reads a shard of MosaicML Streaming's MDS format, version 2.

A shard is, end to end: uint32 samples, uint32 offsets (samples + 1 of them), a JSON object that describes the columns,
the samples. A sample begins with the sizes (uint32 each) of those of its columns whose size varies; all values follow.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from trainer.data.format import strict_json

# How the fields of text data are written. Other columns (images, pickles, ...) are left out of the row.
_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "str": lambda value: value.decode("utf-8"),
    "json": strict_json.loads,
    "int": lambda value: int.from_bytes(value, "little", signed=True),
}


@dataclass(frozen=True)
class Column:
    """`size` is in bytes, or None where each sample says it."""

    name: str
    encoding: str
    size: int | None


def read_shard(content: bytes) -> tuple[list[Column], list[bytes]]:
    """The columns and the samples of a whole shard. Raises `ValueError` where it is none."""
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
    """A value for each column."""
    values = header.get(key) if isinstance(header, dict) else None
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"its header has no {key} as it should")
    return values


def decode_sample(columns: list[Column], sample: bytes) -> dict[str, Any]:
    """The columns of a sample that are text or numbers. Raises `ValueError`, `RecursionError`: it is not what the
    columns say.
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
