"""One rank's file of a checkpoint: a safetensors file whose data is one block of host memory.

The block is laid out as the file is, so that it is hashed and uploaded where it lies, without a second copy. Format:
https://github.com/huggingface/safetensors#format: 8 bytes little-endian header length, a JSON header, the data.
"""

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from trainer.errors import NotFound
from trainer.safetensors_index import read_header
from trainer.store import PART_BYTES, Buffer, Store

STATES = ("master", "exp_avg", "exp_avg_sq")
_HASH_BYTES = 2**20
_ELEMENT_BYTES = 4  # every state is fp32

Interval = tuple[int, int]


@dataclass(frozen=True)
class Shard:
    """What one rank wrote. `intervals`: parameter name -> [begin, end) of its flattened elements in this shard."""

    key: str
    size: int
    sha256: str
    intervals: dict[str, Interval]


@dataclass(frozen=True)
class ShardLayout:
    """Where the states of each interval lie in a shard's data, in elements: one parameter's three beside each other."""

    intervals: dict[str, Interval]

    @property
    def numel(self) -> int:
        return len(STATES) * sum(end - begin for begin, end in self.intervals.values())

    def places(self) -> Iterator[tuple[str, str, int, int]]:
        """(parameter, state, first element, one past the last)."""
        offset = 0
        for name, (begin, end) in self.intervals.items():
            for state in STATES:
                yield name, state, offset, offset + end - begin
                offset += end - begin

    def header(self) -> bytes:
        """What stands before the data in the file."""
        tensors = {
            f"{name}|{state}": {
                "dtype": "F32",
                "shape": [end - begin],
                "data_offsets": [_ELEMENT_BYTES * begin, _ELEMENT_BYTES * end],
            }
            for name, state, begin, end in self.places()
        }
        text = json.dumps(tensors, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the data is aligned
        return struct.pack("<Q", len(text)) + text


def write_shard(run: Store, key: str, layout: ShardLayout, data: memoryview) -> Shard:
    """Hash and upload the file in one pass. `data`: the bytes of `layout`, which must not change meanwhile."""
    header = layout.header()
    digest = hashlib.sha256()

    def hashed() -> Iterator[memoryview]:
        for block in (memoryview(header), data):
            for start in range(0, len(block), _HASH_BYTES):
                chunk = block[start : start + _HASH_BYTES]
                digest.update(chunk)
                yield chunk

    size = len(header) + len(data)
    run.put_chunks(key, hashed(), size)
    return Shard(key, size, digest.hexdigest(), layout.intervals)


def verify_shard(run: Store, shard: Shard) -> str | None:
    """None when the shard's bytes are what was written, else what is wrong; a store that fails raises `StorageError`."""
    where = f"{run.uri}/{shard.key}"
    try:
        size = run.head(shard.key).size
        if size != shard.size:
            return f"{where} has {size} bytes instead of {shard.size}."
        digest = hashlib.sha256()
        for chunk in run.chunks(shard.key, size):
            digest.update(chunk)
    except NotFound as error:
        return str(error)
    return None if digest.hexdigest() == shard.sha256 else f"{where} does not match its sha256."


class StateSlice(NamedTuple):
    """Elements [begin, end) of one state of a parameter's flattened tensor."""

    name: str
    state: str
    begin: int
    end: int


def read_states(run: Store, shard: Shard, pieces: Iterable[StateSlice]) -> Iterator[tuple[StateSlice, Buffer]]:
    """Each piece with its fp32 bytes, all of them in `shard`.

    Only these bytes leave the store: near ones in one request, and a part's worth at a time.
    """
    header = read_header(run, shard.key, shard.size)
    batch: list[StateSlice] = []
    ranges: list[Interval] = []
    for piece in pieces:
        first = shard.intervals[piece.name][0]
        if sum(end - begin for begin, end in ranges) > PART_BYTES:
            yield from _fetch(run, shard, batch, ranges)
            batch, ranges = [], []
        batch.append(piece)
        ranges.append(header[f"{piece.name}|{piece.state}"].byte_range(piece.begin - first, piece.end - first))
    yield from _fetch(run, shard, batch, ranges)


def _fetch(
    run: Store, shard: Shard, pieces: list[StateSlice], ranges: list[Interval]
) -> Iterator[tuple[StateSlice, Buffer]]:
    data = run.get_ranges(shard.key, [begin for begin, _ in ranges], [end for _, end in ranges])
    yield from zip(pieces, data, strict=True)
