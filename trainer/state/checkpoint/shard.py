"""One rank's file of a checkpoint: a safetensors file whose data is one block of host memory.

The block is laid out as the file is, so that it is hashed and uploaded where it lies, without a second copy. Format:
https://github.com/huggingface/safetensors#format: 8 bytes little-endian header length, a JSON header, the data.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field

from trainer.errors import ConfigError, Damaged, NotFound
from trainer.state.checkpoint.contents import Key
from trainer.state.optimizer.optimizer import Interval
from trainer.store.safetensors_index import TensorSource, header_bytes, read_header
from trainer.store.store import Store
from trainer.store.twice import read_twice

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
    """Where the values of `contents` lie in a shard's data: one after the other, a parameter's beside each other."""

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
