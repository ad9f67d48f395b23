"""Keeps the quantized base in the store: written once, and read by any later start at any world size and scope.

    bases/<fingerprint>/<attempt>/00003-00000.bin    the first part of the tensor number 3
    bases/<fingerprint>/manifest.json                the tensors and their bytes; create-only, written last

Packed bytes do not depend on the ranks, so a later start takes the ranges that it needs from the objects that hold
them. Each object has `_OBJECT_BYTES` of one tensor, whoever has written it, in chunks of `CHUNK_BYTES`. Before each
chunk is its hash, so that a part can be checked without reading more than it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from trainer.base.base import Base
from trainer.base.find.locate import in_bucket
from trainer.config import Config
from trainer.errors import NOT_JSON, AlreadyExists, Damaged, NotFound, StorageError, shown
from trainer.run import layout
from trainer.state.zero.division import Span
from trainer.store.json_text import digest_of
from trainer.store.safetensors_index import PackedSources
from trainer.store.store import Store, read_twice

if TYPE_CHECKING:
    from trainer.processes.ranks import World
    from trainer.state.zero.partition import Partition, Partitioner

FORMAT = 2
CHUNK_BYTES = 16 * 2**10
_OBJECT_BYTES = 16 * 2**20
# A rank writes so many objects at once.
_UPLOADS = 4
MANIFEST = "manifest.json"
_ATTEMPT = re.compile(r"[0-9a-f]{8}")
_HASH_BYTES = 16  # the first half of a SHA-256


@dataclass(frozen=True)
class _Objects:
    """The objects of one attempt."""

    store: Store
    attempt: str

    def key(self, tensor: int, part: int) -> str:
        return f"{self.attempt}/{tensor:05d}-{part:05d}.bin"

    def read(self, tensor: int, size: int, begin: int, end: int) -> bytearray:
        """Bytes [begin, end) of the tensor with this number, which has `size`."""
        data = bytearray()
        for part in range(begin // _OBJECT_BYTES, -(-end // _OBJECT_BYTES)):
            start = part * _OBJECT_BYTES
            here = min(_OBJECT_BYTES, size - start)
            data += self._read(tensor, part, here, max(begin - start, 0), min(end - start, here))
        return data

    @read_twice
    def _read(self, tensor: int, part: int, size: int, begin: int, end: int) -> bytearray:
        """Bytes [begin, end) of an object's `size`. Whole chunks are read and checked."""
        first, key, each = begin // CHUNK_BYTES, self.key(tensor, part), _HASH_BYTES + CHUNK_BYTES
        last = -(-end // CHUNK_BYTES)
        span = first * each, min(last * each, size + last * _HASH_BYTES)
        try:
            found = memoryview(self.store.get_range(key, *span))
        except NotFound as error:
            raise Damaged(f"{self.store.uri}/{key} is gone.") from error
        data = bytearray()
        for number, at in enumerate(range(0, len(found), each), first):
            chunk = found[at + _HASH_BYTES : at + each]
            if found[at : at + _HASH_BYTES] != self._hash(key, number, chunk):
                raise Damaged(f"{self.store.uri}/{key} is damaged between bytes {span[0]} and {span[1]}.")
            data += chunk
        return data[begin - first * CHUNK_BYTES : end - first * CHUNK_BYTES]

    def write(self, tensor: int, part: int, data: bytes) -> None:
        key, content = self.key(tensor, part), bytearray()
        for number, begin in enumerate(range(0, len(data), CHUNK_BYTES)):
            chunk = memoryview(data)[begin : begin + CHUNK_BYTES]
            content += self._hash(key, number, chunk)
            content += chunk
        self.store.put(key, bytes(content))

    def _hash(self, key: str, number: int, chunk: memoryview) -> bytes:
        """The hash of a chunk by its number in the object. That of another place differs."""
        digest = hashlib.sha256(f"{key} {number} ".encode())
        digest.update(chunk)
        return digest.digest()[:_HASH_BYTES]


@dataclass(frozen=True)
class CachedTensor:
    """A packed tensor in the cache, as a flat uint8 source. Reading raises `Damaged` if bytes have changed."""

    objects: _Objects
    number: int
    shape: tuple[int]
    dtype: str = "U8"

    def read(self, begin: int, end: int) -> bytearray:
        return self.objects.read(self.number, self.shape[0], begin, end)


@dataclass(frozen=True)
class BaseCache:
    """One quantized base. Under double quantization `means` has the means of absmax of each module."""

    store: Store
    attempt: str
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
def read_manifest(folder: Store) -> bytes:
    """The manifest, for all ranks. Raises `Damaged` if it is missing or not what was written."""
    try:
        content = folder.get(MANIFEST)
    except NotFound as error:
        raise Damaged(f"{folder.uri}/{MANIFEST} is gone.") from error
    parse_manifest(folder, content)
    return content


def parse_manifest(folder: Store, content: bytes) -> BaseCache:
    """The cache in `folder` by its manifest. Raises `Damaged` if that is not what was written."""
    try:
        outer = json.loads(content)
        body: dict[str, Any] = outer["body"]
        if outer["sha256"] != digest_of(body):
            raise ValueError("its hash differs")
        if body["format"] != FORMAT:
            raise ValueError(f"its format is {shown(body['format'])}")
        objects, sizes = _Objects(folder, body["attempt"]), [size for _, size in body["tensors"]]
        if not _ATTEMPT.fullmatch(objects.attempt):
            raise ValueError(f"its attempt is {shown(objects.attempt)}")
        if not all(type(size) is int and 0 < size < 2**48 for size in sizes):
            raise ValueError("its sizes are not what was written")
        tensors = {
            f"{name}": CachedTensor(objects, number, (size,)) for number, (name, size) in enumerate(body["tensors"])
        }
        means = {path: [float(mean) for mean in slices] for path, slices in body["means"].items()}
    except (*NOT_JSON, LookupError, TypeError, AttributeError) as error:
        raise Damaged(f"{folder.uri}/{MANIFEST} is damaged: {error}.") from error
    return BaseCache(folder, objects.attempt, tensors, means)


def write_cache(
    folder: Store,
    partitions: Mapping[str, Partition],
    means: dict[str, list[float]],
    partitioner: Partitioner,
    ranks: World,
    log: Callable[[str], None],
) -> None:
    """Commit the packed tensors, whose `partitions` the ranks hold. Collective.

    If the store fails, only the cache is lost, and the run goes on. Objects of failed attempts are removed.
    """
    objects = _Objects(folder, ranks.broadcast(uuid4().hex[:8]))
    uploads = _Uploads(objects)
    for number, partition in enumerate(partitions.values()):
        for part, data in _own_objects(number, partition, partitioner):
            uploads.begin(number, part, data)
    failed = next(filter(None, ranks.gather_objects(uploads.end())), "")
    if ranks.rank == 0:
        if not failed:
            failed = _commit(folder, objects.attempt, partitions, means)
        with suppress(StorageError):
            _collect(folder, objects.attempt, failed=bool(failed))
        log(
            f"the quantized base is not cached: {failed}" if failed else f"the quantized base is cached in {folder.uri}"
        )


def _own_objects(number: int, partition: Partition, partitioner: Partitioner) -> Iterator[tuple[int, bytes]]:
    """Yield (part, bytes) of the objects of a tensor that this rank writes. Collective.

    A rank that has all bytes of an object writes it. If several have some of them, one gets those of the others.
    """
    size, own, division = partition.numel, partitioner.read_part(partition), partitioner.division
    shared = list[Span]()
    for part, begin in enumerate(range(0, size, _OBJECT_BYTES)):
        end = min(size, begin + _OBJECT_BYTES)
        if own.begin <= begin and end <= own.end:
            yield part, own.local[begin - own.begin : end - own.begin].cpu().numpy().tobytes()
            continue
        holders = [place for place, _, _ in division.places(begin, end, size)]
        if len(holders) > 1:
            shared.append(Span(begin, end, holders[(number + part) % len(holders)]))
    for span, data in partitioner.brought_together(own, size, shared):
        yield span.begin // _OBJECT_BYTES, data.numpy().tobytes()


class _Uploads:
    """A few uploads at once, and the first error of any."""

    def __init__(self, objects: _Objects) -> None:
        self._objects, self._failure = objects, ""
        self._pool, self._pending = ThreadPoolExecutor(_UPLOADS, "cache"), deque[Future[None]]()

    def begin(self, number: int, part: int, data: bytes) -> None:
        """Write an object, unless one has failed already. Waits while others are being written."""
        if not self._failure:
            self._pending.append(self._pool.submit(self._objects.write, number, part, data))
        if len(self._pending) >= _UPLOADS:
            self._wait()

    def end(self) -> str:
        """Wait for all. Returns the error in words, or an empty text."""
        while self._pending:
            self._wait()
        self._pool.shutdown()
        return self._failure

    def _wait(self) -> None:
        try:
            self._pending.popleft().result()
        except StorageError as error:
            self._failure = self._failure or str(error)


def _commit(folder: Store, attempt: str, partitions: Mapping[str, Partition], means: dict[str, list[float]]) -> str:
    """Write the manifest. Returns the error in words, or an empty text."""
    tensors = [[name, partition.numel] for name, partition in partitions.items()]
    body = {"format": FORMAT, "attempt": attempt, "tensors": tensors, "means": means}
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
    kept = parse_manifest(folder, read_manifest(folder)).attempt
    for entry in folder.list():
        if entry.key != MANIFEST and not entry.key.startswith(f"{kept}/"):
            folder.delete(entry.key)
