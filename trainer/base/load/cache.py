"""Keeps the quantized base in the store: written once, and read by any later start at any world size and scope.

    bases/<fingerprint>/<attempt>/rank-00003-0000.bin    ranges of packed tensors, one after another
    bases/<fingerprint>/manifest.json                    the places of each tensor's bytes; create-only, written last

Packed bytes do not depend on the ranks, so a reader takes the ranges that it needs from any objects that hold them.
Every `CHUNK_BYTES` of a range have their own hash, so that a part can be checked without reading the whole range.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from trainer.base.base import Base
from trainer.base.find.locate import in_bucket
from trainer.config import Config
from trainer.errors import NOT_JSON, AlreadyExists, Damaged, NotFound, StorageError, shown
from trainer.run import layout
from trainer.store.canonical_json import digest_of
from trainer.store.safetensors_index import PackedSources
from trainer.store.store import Store, read_twice

if TYPE_CHECKING:
    from trainer.processes.ranks import World
    from trainer.state.zero.partition import Partition

FORMAT = 1
CHUNK_BYTES = 256 * 2**10
_OBJECT_BYTES = 32 * 2**20
MANIFEST = "manifest.json"
_KEY = re.compile(r"[0-9a-f]{8}/rank-[0-9]{5,}-[0-9]{4,}\.bin")
_HASH_CHARACTERS = 32  # the first half of a SHA-256, as hexadecimal digits


@dataclass(frozen=True)
class Extent:
    """Bytes [begin, end) of a tensor, at `offset` of the object `key`. `hashes` has those of its chunks, end to end."""

    begin: int
    end: int
    key: str
    offset: int
    hashes: str


@dataclass(frozen=True)
class CachedTensor:
    """A packed tensor in the cache, as a flat uint8 source. Reading raises `Damaged` if bytes have changed."""

    store: Store
    extents: tuple[Extent, ...]
    shape: tuple[int, ...]
    dtype: str = "U8"

    def read(self, begin: int, end: int) -> bytearray:
        data = bytearray()
        for extent in self.extents:
            first, last = max(begin, extent.begin), min(end, extent.end)
            if first < last:
                data += self._read(extent, first - extent.begin, last - extent.begin)
        return data

    @read_twice
    def _read(self, extent: Extent, begin: int, end: int) -> bytearray:
        """Bytes [begin, end) of an extent. Whole chunks are read and checked."""
        start = begin // CHUNK_BYTES * CHUNK_BYTES
        stop = min(-(-end // CHUNK_BYTES) * CHUNK_BYTES, extent.end - extent.begin)
        try:
            data = self.store.get_range(extent.key, extent.offset + start, extent.offset + stop)
        except NotFound as error:
            raise Damaged(f"{self.store.uri}/{extent.key} is gone.") from error
        number = start // CHUNK_BYTES * _HASH_CHARACTERS
        expected = extent.hashes[number : number + len(_hashes(data))]
        if _hashes(data) != expected:
            raise Damaged(
                f"{self.store.uri}/{extent.key} is damaged between bytes {extent.offset + start} and "
                f"{extent.offset + stop}."
            )
        return data[begin - start : end - start]


@dataclass(frozen=True)
class BaseCache:
    """One quantized base. Under double quantization `means` has the means of absmax of each module."""

    store: Store
    tensors: dict[str, CachedTensor]
    means: dict[str, list[float]]

    def sources(self, path: str) -> PackedSources:
        """The packed weights of the module at `path`. Raises `Damaged` if the cache has none."""
        parts = self._parts.get(path)
        if parts is None:
            raise Damaged(f"{self.store.uri}/{MANIFEST} has no {path}.")
        return PackedSources({**parts}, self.means.get(path))

    @cached_property
    def _parts(self) -> dict[str, dict[str, CachedTensor]]:
        """Module -> name of the parameter in the format of weights in memory -> tensor."""
        found = dict[str, dict[str, CachedTensor]]()
        for name, tensor in self.tensors.items():
            path, _, part = name.rpartition(".")
            found.setdefault(path, {})[part] = tensor
        return found


def cache_key(base: Base, config: Config) -> str:
    """The folder's key under the store's root. Reads samples of the base's weights.

    Another base, another version of its files, another quantization or number of layers gives another folder.
    """
    facts = [
        FORMAT,
        base.fingerprint,
        # Another base may have the same sizes and times if its files were copied with theirs. A bucket's versions are
        # hashes.
        *([] if in_bucket(base.name) else [base.samples]),
        base.versions,
        {"type": config.quant.type, "block_size": config.quant.block_size, "double": config.quant.double},
        config.model.dtype,
        config.model.layers,
    ]
    return layout.bases(hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16])


@read_twice
def open_cache(folder: Store) -> BaseCache:
    """Open the cache. Raises `Damaged` if the manifest is missing or not what was written."""
    try:
        outer = json.loads(folder.get(MANIFEST))
        body: dict[str, Any] = outer["body"]
        if outer["sha256"] != digest_of(body):
            raise ValueError("its hash differs")
        if body["format"] != FORMAT:
            raise ValueError(f"its format is {shown(body['format'])}")
        tensors = {name: _cached(folder, name, extents) for name, extents in body["tensors"].items()}
        means = {path: [float(mean) for mean in slices] for path, slices in body["means"].items()}
    except NotFound as error:
        raise Damaged(f"{folder.uri}/{MANIFEST} is gone.") from error
    except (*NOT_JSON, LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"{folder.uri}/{MANIFEST} is damaged: {error}.") from error
    return BaseCache(folder, tensors, means)


def _cached(folder: Store, name: str, given: list[list[Any]]) -> CachedTensor:
    """The cached tensor. Raises `ValueError` unless its extents are contiguous from 0, in objects of this cache."""
    extents = tuple(Extent(*extent) for extent in sorted(given))
    expected = 0
    for extent in extents:
        numbers = (extent.begin, extent.end, extent.offset)
        chunks = math.ceil((extent.end - extent.begin) / CHUNK_BYTES)
        if (
            not all(type(number) is int for number in numbers)
            or not expected == extent.begin < extent.end
            or not 0 <= extent.offset < 2**63 - extent.end
            or not _KEY.fullmatch(extent.key)
            or len(extent.hashes) != chunks * _HASH_CHARACTERS
        ):
            raise ValueError(f"its extents of {shown(name)} are not what was written")
        expected = extent.end
    return CachedTensor(folder, extents, (expected,))


def write_cache(
    folder: Store,
    partitions: dict[str, Partition],
    means: dict[str, list[float]],
    writers: int,
    ranks: World,
    log: Callable[[str], None],
) -> None:
    """Commit the partitions of the first `writers` ranks, which are one whole copy of the base. Collective.

    If the store fails, only the cache is lost, and the run goes on. Objects of failed attempts are removed.
    """
    attempt: str = ranks.broadcast(uuid4().hex[:8])
    failure, writer = "", _Writer(folder, f"{attempt}/rank-{ranks.rank:05d}")
    try:
        if ranks.rank < writers:
            for name, partition in partitions.items():
                writer.add(name, partition)
            writer.flush()
    except StorageError as error:
        failure = str(error)
    reports = ranks.gather_objects((failure, writer.extents))
    failed = next((text for text, _ in reports if text), "")
    if ranks.rank == 0:
        if not failed:
            failed = _commit(folder, [extents for _, extents in reports], means)
        with suppress(StorageError):
            _collect(folder, attempt, failed=bool(failed))
        log(
            f"the quantized base is not cached: {failed}" if failed else f"the quantized base is cached in {folder.uri}"
        )


def _commit(folder: Store, parts: list[dict[str, list[list[Any]]]], means: dict[str, list[float]]) -> str:
    """Write the manifest. Returns the error in words, or an empty text."""
    tensors: dict[str, list[list[Any]]] = {}
    for part in parts:
        for name, extents in part.items():
            tensors.setdefault(name, []).extend(extents)
    body = {"format": FORMAT, "tensors": tensors, "means": means}
    try:
        folder.create(MANIFEST, json.dumps({"sha256": digest_of(body), "body": body}).encode())
    except AlreadyExists:
        pass  # another run was faster and wrote the same bytes
    except StorageError as error:
        return str(error)
    return ""


def _collect(folder: Store, attempt: str, *, failed: bool) -> None:
    """Remove objects that no manifest will ever name: those of a failed `attempt`, or all but the committed one's."""
    if failed:
        folder.delete_folder(f"{attempt}/")
        return
    named = {extent.key for tensor in open_cache(folder).tensors.values() for extent in tensor.extents}
    for entry in folder.list():
        if entry.key != MANIFEST and entry.key not in named:
            folder.delete(entry.key)


@dataclass
class _Writer:
    """Collects this rank's bytes into objects of about `_OBJECT_BYTES`."""

    folder: Store
    prefix: str
    extents: dict[str, list[list[Any]]] = field(default_factory=dict)
    _buffer: bytearray = field(default_factory=bytearray)
    _objects: int = 0

    def add(self, name: str, partition: Partition) -> None:
        extents = self.extents.setdefault(name, [])
        for begin in range(partition.begin, partition.end, _OBJECT_BYTES):
            end = min(partition.end, begin + _OBJECT_BYTES)
            values = partition.local[begin - partition.begin : end - partition.begin]
            data = values.cpu().numpy().tobytes()
            extents.append([begin, end, self._key, len(self._buffer), _hashes(data)])
            self._buffer += data
            if len(self._buffer) >= _OBJECT_BYTES:
                self.flush()

    @property
    def _key(self) -> str:
        return f"{self.prefix}-{self._objects:04d}.bin"

    def flush(self) -> None:
        if self._buffer:
            self.folder.put(self._key, bytes(self._buffer))
            self._buffer.clear()
            self._objects += 1


def _hashes(data: bytes | bytearray) -> str:
    view = memoryview(data)
    chunks = (view[begin : begin + CHUNK_BYTES] for begin in range(0, len(view), CHUNK_BYTES))
    return "".join(hashlib.sha256(chunk).hexdigest()[:_HASH_CHARACTERS] for chunk in chunks)
