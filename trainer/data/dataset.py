"""The compiled data set: its format, and verified reading of it. `docs/data-format.md` describes it for other tools.

A folder holds shards of documents and a manifest, written last. Shard i is three files: `tokens-i.bin`, the tokens of
its documents end to end; `documents-i.bin`, where each begins; `blocks-i.bin`, a SHA-256 of the tokens of every 256
documents, so that a range read from the middle of a shard can be checked.
"""

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from trainer import run_layout
from trainer.errors import StorageError
from trainer.store import Store

FORMAT = 1
MANIFEST = "manifest.json"
BLOCK_DOCUMENTS = 256
TOKEN = np.dtype("<u4")
OFFSET = np.dtype("<u8")
# The top bit of a stored token says that it is trained; the rest is its id.
TARGET_BIT = np.uint32(1 << 31)
_DIGEST_BYTES = 32
# Enough requests in flight to hide a bucket's latency.
_READERS = 16


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FileRecord(_Record):
    """An object of the data set: `key` in its folder, `size` in bytes, `sha256` in hex."""

    key: str
    size: int
    sha256: str


class ShardRecord(_Record):
    """A shard holds documents of one source only."""

    source: int
    documents: int
    tokens: int
    targets: int
    tokens_file: FileRecord
    documents_file: FileRecord
    blocks_file: FileRecord


class SourceRecord(_Record):
    """What a source contributed. `files` are its files' URIs."""

    documents: int = 0
    tokens: int = 0
    targets: int = 0
    files: list[str] = []


class Counters(_Record):
    """What became of the rows: those that are no documents, and those that were cut to the sequence length."""

    rows: int = 0
    bad_rows: int = 0
    dropped: int = 0
    truncated: int = 0
    without_targets: int = 0


class Manifest(_Record):
    """What a data set holds. `bad_rows` describes the first few of them, as `file:line: reason`."""

    format: int
    fingerprint: str
    documents: int
    tokens: int
    targets: int
    sources: list[SourceRecord]
    shards: list[ShardRecord]
    counters: Counters
    bad_rows: list[str]


@dataclass(frozen=True, eq=False)
class Dataset:
    """An opened data set. Documents are numbered through all shards, and so are blocks.

    Attributes:
        store: the folder of the data set.
        lengths: (documents,) int32, tokens of each document.
        blocks: (blocks + 1,) int64, the first document of each block, and the number of documents.
        block_shards: (blocks,) int32, the shard that each block lies in.
        block_starts: (blocks,) int64, where a block begins in its shard, in tokens.
        digests: the SHA-256 of each block's tokens.
    """

    manifest: Manifest
    store: Store
    lengths: NDArray[np.int32]
    blocks: NDArray[np.int64]
    block_shards: NDArray[np.int32]
    block_starts: NDArray[np.int64]
    digests: list[bytes]

    @property
    def block_sources(self) -> NDArray[np.int32]:
        """(blocks,) int32, the source that each block's documents come from."""
        return np.array([shard.source for shard in self.manifest.shards], np.int32)[self.block_shards]

    def read(self, blocks: Iterable[int]) -> dict[int, NDArray[np.uint32]]:
        """The documents of some blocks by number, each (tokens,) uint32 with `TARGET_BIT` set on trained tokens.

        Raises:
            StorageError: a block is not what was written, after a second attempt.
        """
        by_shard: dict[int, list[int]] = {}
        for block in blocks:
            by_shard.setdefault(int(self.block_shards[block]), []).append(int(block))
        documents = {}
        with ThreadPoolExecutor(_READERS) as pool:
            for read in pool.map(self._read_shard, by_shard, by_shard.values()):
                for block, raw in read:
                    documents.update(self._split(block, raw))
        return documents

    def _read_shard(self, shard: int, blocks: list[int]) -> list[tuple[int, bytes]]:
        key = self.manifest.shards[shard].tokens_file.key
        starts = [int(self.block_starts[block]) * TOKEN.itemsize for block in blocks]
        ends = [start + self._block_bytes(block) for start, block in zip(starts, blocks, strict=True)]
        data = self.store.get_ranges(key, starts, ends)
        for index, (block, start, end) in enumerate(zip(blocks, starts, ends, strict=True)):
            if not self._intact(block, data[index]):
                data[index] = bytes(self.store.get_range(key, start, end))
                if not self._intact(block, data[index]):
                    raise StorageError(
                        f"{self.store.uri}/{key}: bytes {start} to {end} are not what was written (their SHA-256 "
                        f"differs). Delete {self.store.uri}, and the data is compiled again."
                    )
        return list(zip(blocks, data, strict=True))

    def _block_bytes(self, block: int) -> int:
        return int(self.lengths[self.blocks[block] : self.blocks[block + 1]].sum(dtype=np.int64)) * TOKEN.itemsize

    def _intact(self, block: int, raw: bytes) -> bool:
        return hashlib.sha256(raw).digest() == self.digests[block]

    def _split(self, block: int, raw: bytes) -> dict[int, NDArray[np.uint32]]:
        first, last = int(self.blocks[block]), int(self.blocks[block + 1])
        tokens = np.frombuffer(raw, TOKEN)
        documents = np.split(tokens, np.cumsum(self.lengths[first : last - 1]))
        return dict(zip(range(first, last), documents, strict=True))


def open_dataset(store: Store, fingerprint: str) -> Dataset:
    """Open a compiled data set; `store` is the root that runs share. Reads all lengths, but no tokens.

    Raises:
        NotFound: it is not there, or its manifest was not written yet.
        StorageError: it is damaged, or of another format.
    """
    folder = store.sub(run_layout.dataset(fingerprint))
    try:
        manifest = Manifest.model_validate_json(folder.get(MANIFEST))
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise StorageError(f"{folder.uri}/{MANIFEST}: not a manifest of this format ({problem}). Delete it.") from error
    if manifest.format != FORMAT:
        raise StorageError(f"{folder.uri}/{MANIFEST}: has format {manifest.format}, but {FORMAT} is needed. Delete it.")
    with ThreadPoolExecutor(_READERS) as pool:
        offsets = list(pool.map(_reader(folder, OFFSET), [shard.documents_file for shard in manifest.shards]))
        digests = list(pool.map(_reader(folder, np.dtype("u1")), [shard.blocks_file for shard in manifest.shards]))
    return _assemble(manifest, folder, offsets, digests)


def _assemble(manifest: Manifest, folder: Store, offsets: list[NDArray], digests: list[NDArray]) -> Dataset:
    """`offsets`: for each shard (documents + 1,) uint64 in tokens; `digests`: for each shard (blocks * 32,) uint8."""
    counts = np.array([shard.documents for shard in manifest.shards], np.int64)
    firsts = np.cumsum(counts) - counts
    block_places = [np.arange(0, count, BLOCK_DOCUMENTS) for count in counts]
    blocks = [first + places for first, places in zip(firsts, block_places, strict=True)]
    return Dataset(
        manifest=manifest,
        store=folder,
        lengths=np.concatenate([np.diff(part) for part in offsets]).astype(np.int32),
        blocks=np.concatenate([*blocks, [counts.sum()]]),
        block_shards=np.repeat(np.arange(len(block_places), dtype=np.int32), [len(part) for part in block_places]),
        block_starts=np.concatenate([off[part] for off, part in zip(offsets, block_places, strict=True)]).astype(
            np.int64
        ),
        digests=[row.tobytes() for part in digests for row in part.reshape(-1, _DIGEST_BYTES)],
    )


def _reader(folder: Store, dtype: np.dtype) -> Callable[[FileRecord], NDArray]:
    def read(file: FileRecord) -> NDArray:
        data = folder.get(file.key)
        if hashlib.sha256(data).hexdigest() != file.sha256:
            raise StorageError(
                f"{folder.uri}/{file.key}: not what was written (its SHA-256 differs). Delete {folder.uri}, and the data "
                "is compiled again."
            )
        return np.frombuffer(data, dtype)

    return read
