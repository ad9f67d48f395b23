"""One rank's file of a checkpoint, and which values of each state it holds. A value lies with the first element that it
belongs to.

The file is a safetensors file. Its data is one block of host memory with the layout of the file, so it is hashed and
uploaded without a second copy. Format: https://github.com/huggingface/safetensors#format: 8 bytes little-endian header
length, a JSON header, the data.

A shard's intervals are intervals of elements, by ZeRO-3's rule. A state with one value for a block of elements, or with
a vector of its own, has fewer values; these are divided by the rules of `Contents`. A manifest lists no intervals,
because they follow from the shape, the number of shards and the shard. With a thousand ranks a list would take 133 MB.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

from pydantic import ConfigDict, Field

from trainer.errors import ConfigError, Damaged, NotFound
from trainer.state.optimizer import Interval, State
from trainer.store.safetensors_index import TensorSource, header_bytes, read_header
from trainer.store.store import Store, read_twice


@dataclass(frozen=True)
class EvenDivision:
    """ZeRO-3's rule: of n elements, shard r of W holds [r * ceil(n / W), (r + 1) * ceil(n / W)), cut off at n."""

    numels: Mapping[str, int]
    shards: int

    def interval(self, name: str, shard: int) -> Interval:
        numel = self.numels[name]
        length = -(-numel // self.shards)
        return min(numel, shard * length), min(numel, (shard + 1) * length)

    def intervals(self, shard: int) -> Mapping[str, Interval]:
        every = ((name, self.interval(name, shard)) for name in self.numels)
        return {name: (begin, end) for name, (begin, end) in every if begin < end}

    def holders(self, name: str, begin: int, end: int) -> Iterable[int]:
        length = -(-self.numels[name] // self.shards)
        return range(begin // length, -(-end // length)) if begin < end else ()


class Key(NamedTuple):
    """One state of one parameter."""

    name: str
    state: State


@dataclass(frozen=True)
class Contents:
    """The contents of `shards` shards, by the `division` of elements and each parameter's `states`."""

    division: EvenDivision
    states: Mapping[str, tuple[State, ...]]
    shards: int

    def of(self, shard: int) -> dict[Key, Interval]:
        """The values in shard number `shard`, if it has any, in the order in which they lie there."""
        elements = self.division.intervals(shard)
        found: dict[Key, Interval] = {}
        # Bytes come last, so that all fp32 values are aligned in the file.
        for dtype in ("F32", "U8"):
            for name, states in self.states.items():
                for state in states:
                    if state.dtype == dtype:
                        begin, end = self._interval(Key(name, state), elements.get(name, (0, 0)), shard)
                        if begin < end:
                            found[Key(name, state)] = begin, end
        return found

    def _interval(self, key: Key, elements: Interval, shard: int) -> Interval:
        if key.state.length is not None:
            return self._vector(key).interval(key.name, shard)
        begin, end = elements
        return -(-begin // key.state.block), -(-end // key.state.block)

    def holders(self, key: Key, begin: int, end: int) -> Iterable[int]:
        """The numbers of the shards that hold some of the values [begin, end)."""
        if begin >= end:
            return ()
        if key.state.length is not None:
            return self._vector(key).holders(key.name, begin, end)
        block = key.state.block
        return self.division.holders(key.name, begin * block, (end - 1) * block + 1)

    def _vector(self, key: Key) -> EvenDivision:
        return EvenDivision({key.name: key.state.length or 0}, self.shards)


_HASH_BYTES = 2**20


@dataclass(frozen=True)
class Shard:
    """The file that one rank wrote."""

    __pydantic_config__: ClassVar = ConfigDict(strict=True)

    key: str
    size: Annotated[int, Field(ge=0, lt=2**63)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class ShardLayout:
    """The places of the values of `contents` in a shard's data. They follow each other, parameter by parameter."""

    contents: Mapping[Key, Interval]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(key.state.item * (end - begin) for key, (begin, end) in self.contents.items())

    def places(self) -> Iterator[tuple[Key, int, int]]:
        """(state of a parameter, its first byte, one past the last)."""
        offset = 0
        for key, (begin, end) in self.contents.items():
            size = key.state.item * (end - begin)
            yield key, offset, offset + size
            offset += size

    def header(self) -> bytes:
        """The bytes before the data in the file."""
        tensors = {
            title(key): {
                "dtype": key.state.dtype,
                "shape": [(end - begin) // key.state.item],
                "data_offsets": [begin, end],
            }
            for key, begin, end in self.places()
        }
        return header_bytes(tensors)


def title(key: Key) -> str:
    """The tensor's name in the file."""
    return f"{key.name}|{key.state.name}"


def write_shard(folder: Store, key: str, layout: ShardLayout, data: memoryview) -> Shard:
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
    folder.put_chunks(key, hashed(), size)
    return Shard(key, size, digest.hexdigest())


def verify_shard(folder: Store, shard: Shard, contents: Mapping[Key, Interval]) -> str | None:
    """None when the shard's bytes are what was written and hold `contents`, else what is wrong, which two reads have
    found.

    A store that fails raises `StorageError`.
    """
    try:
        _check_shard(folder, shard, contents)
    except Damaged as error:
        return str(error)
    return None


@read_twice
def _check_shard(folder: Store, shard: Shard, contents: Mapping[Key, Interval]) -> None:
    """Raises `Damaged` unless its bytes are what was written and hold `contents`."""
    where = f"{folder.uri}/{shard.key}"
    try:
        size = folder.head(shard.key).size
        if size != shard.size:
            raise Damaged(f"{where} has {size} bytes instead of {shard.size}.")
        digest = hashlib.sha256()
        for chunk in folder.chunks(shard.key, size):
            digest.update(chunk)
        if digest.hexdigest() != shard.sha256:
            raise Damaged(f"{where} does not match its sha256.")
        tensors_of(folder, shard, contents)
    except NotFound as error:
        raise Damaged(str(error)) from error


def tensors_of(folder: Store, shard: Shard, contents: Mapping[Key, Interval]) -> dict[str, TensorSource]:
    """The shard's tensors by `parameter|state`; raises `Damaged` unless they are those of `contents`."""
    try:
        tensors = read_header(folder, shard.key, shard.size)
    except ConfigError as error:
        raise Damaged(str(error)) from error
    expected = {title(key): (key.state.dtype, (end - begin,)) for key, (begin, end) in contents.items()}
    if {key: (tensor.dtype, tensor.shape) for key, tensor in tensors.items()} != expected:
        raise Damaged(f"{folder.uri}/{shard.key} does not hold the elements that its manifest says.")
    return tensors
