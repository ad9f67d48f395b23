"""The format of a compiled data set, and its verified reading. `docs/data-format.md` describes it for other tools.

A folder holds shards of documents and a manifest, which is written last. Shard i is three files: `tokens-i.bin` has the
tokens of its documents end to end, `documents-i.bin` where each document begins, and `blocks-i.bin` the first document
and the SHA-256 of every block. A block is the unit of reading and of checking: up to 256 documents and up to 1 MiB of
tokens, or one document that is longer. Shards belong to chapters. A large data set has several chapters, and each can
be opened as soon as it is compiled.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.data.dataset.manifest import (
    ColumnRecord,
    DatasetManifest,
    FileRecord,
    ShardRecord,
    damaged,
    read_manifest,
)
from trainer.data.format.row_format import COUNTED, Column
from trainer.errors import Damaged, NotFound, Unreachable
from trainer.run import layout
from trainer.store.store import Buffer, Store, read_twice

TOKEN = np.dtype("<u4")
OFFSET = np.dtype("<u8")
HASH = np.dtype("<u8")
BLOCK = np.dtype([("document", "<u8"), ("sha256", "V32")])
COLUMN_BLOCK = np.dtype([("value", "<u8"), ("sha256", "V32")])
"""For a column in a block of documents: the number of the shard's values before it, and the SHA-256 of its bytes."""
# The top bit of a stored token says that it is trained. The bits below all of these hold the token's id.
TARGET_BIT = np.uint32(1 << 31)
# The bit below it says that a token is the first of the rejected answer of a pair.
REJECTED_BIT = np.uint32(1 << 30)
# The next two say so of the first token of a desired answer, and of the mismatched answer behind a labelled one.
DESIRED_BIT = np.uint32(1 << 29)
MISMATCHED_BIT = np.uint32(1 << 28)
# The bit below them says that a token is the first of a further answer to the prompt at the beginning of its document.
# The document holds that prompt only once.
SHARED_BIT = np.uint32(1 << 27)
ID_BITS = np.uint32(SHARED_BIT - 1)
# A token with one of these bits begins a new segment inside a document.
SEGMENT_BITS = REJECTED_BIT | MISMATCHED_BIT | SHARED_BIT

BLOCK_DOCUMENTS = 256
BLOCK_TOKENS = 2**18
SHARD_TOKENS = 2**24
# Enough requests in flight to hide a bucket's latency.
_READERS = 16
# A restart of a store, or a new gateway, takes minutes. All ranks of a run wait for it together.
_PATIENCE_SECONDS = 300.0
_FIRST_PAUSE_SECONDS = 0.25
_LONGEST_PAUSE_SECONDS = 5.0

T = TypeVar("T")


@dataclass
class Reads:
    """Counts repeated reads: requests after a failure of the store, and blocks whose hash differed.

    Once `over` is set, nobody needs the data any more, and nothing is repeated."""

    retried: int = 0
    refetched: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def repeated(self) -> int:
        return self.retried + self.refetched

    def patiently(self, request: Callable[[], T]) -> T:
        """Make a request, and repeat it while the store is out of reach, because the store may be restarting."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                return request()
            except Unreachable:
                # When Python exits it joins the threads that read ahead, so they must stop waiting for the store then.
                if time.monotonic() + pause > deadline or self.over.wait(pause):
                    raise
                self.retried += 1
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def proven(
        self,
        store: Store,
        key: str,
        starts: list[int],
        ends: list[int],
        digests: Sequence[bytes],
        damaged: Callable[[int, int], Damaged],
    ) -> list[Buffer]:
        """Read ranges of an object, and check their SHA-256 against `digests`.

        A range that differs is read once more. If it differs again, the error that `damaged` makes is raised."""
        # A block of documents without pictures has no values in their column, and no store answers an empty range.
        filled = [number for number, (start, end) in enumerate(zip(starts, ends, strict=True)) if start < end]
        asked = [starts[number] for number in filled], [ends[number] for number in filled]
        read = self.patiently(lambda: store.get_ranges(key, *asked)) if filled else []
        found: list[Buffer] = [b""] * len(starts)
        for number, content in zip(filled, read, strict=True):
            found[number] = content
        for number, (start, end, digest) in enumerate(zip(starts, ends, digests, strict=True)):
            if hashlib.sha256(found[number]).digest() != digest:
                self.refetched += 1
                found[number] = self.patiently(lambda start=start, end=end: store.get_range(key, start, end))
                if hashlib.sha256(found[number]).digest() != digest:
                    raise damaged(start, end)
        return found


@dataclass(frozen=True, eq=False)
class ReadBlocks:
    """Some blocks in memory. `parts` holds the tokens of each of `numbers`, and `columns` the values of each column.

    Each part is (tokens,) uint32, with `TARGET_BIT` set on trained tokens.
    """

    dataset: "Dataset"
    numbers: NDArray[np.int64]
    parts: list[NDArray[np.uint32]]
    columns: Mapping[str, list[NDArray[Any]]] = field(default_factory=dict[str, list[NDArray[Any]]])

    def gather(self, documents: NDArray[np.int64]) -> NDArray[np.uint32]:
        """The tokens of `documents`, end to end in their order."""
        index, begins, ends = self._tokens(documents)
        parts = (self.parts[block] for block in index.tolist())
        return np.concatenate(
            [part[begin:end] for part, begin, end in zip(parts, begins.tolist(), ends.tolist(), strict=True)]
        )

    def gather_column(self, name: str, documents: NDArray[np.int64]) -> list[NDArray[Any]]:
        """The values of a column for each of the `documents`."""
        index, begins, ends = self._tokens(documents)
        per = self.dataset.columns[name].record.per
        if per == "document":
            begins = documents - self.dataset.blocks[self.numbers][index]
            ends = begins + 1
        elif per == "picture":
            before = [np.concatenate([[0], np.cumsum(part, dtype=np.int64)]) for part in self.columns[COUNTED]]
            places = documents - self.dataset.blocks[self.numbers][index]
            begins = np.array([before[block][place] for block, place in zip(index, places, strict=True)], np.int64)
            ends = np.array([before[block][place + 1] for block, place in zip(index, places, strict=True)], np.int64)
        elif per == "target":
            before = [np.concatenate([[0], np.cumsum(part >= TARGET_BIT)]) for part in self.parts]
            begins, ends = (
                np.array([before[block][place] for block, place in zip(index, places, strict=True)], np.int64)
                for places in (begins, ends)
            )
        places = zip(index.tolist(), begins.tolist(), ends.tolist(), strict=True)
        return [self.columns[name][block][begin:end] for block, begin, end in places]

    def _tokens(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """For each document the place of its block in `parts`, and where its tokens begin and end in the block."""
        data, firsts = self.dataset, self.dataset.blocks[self.numbers]
        index = np.searchsorted(firsts, documents, side="right") - 1
        begins = data.offsets[firsts[index]]
        return index, data.offsets[documents] - begins, data.offsets[documents + 1] - begins


@dataclass(frozen=True, eq=False)
class StoredColumn:
    """A column of a data set. `files` has one file for each shard.

    `begins` (blocks,) and `ends` say where the values of each block lie in the file of its shard, and `digests` are the
    SHA-256 of the values.
    """

    record: ColumnRecord
    files: list[str]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    digests: list[bytes]

    def block(self, number: int) -> "StoredColumn":
        part = slice(number, number + 1)
        return replace(self, begins=self.begins[part], ends=self.ends[part], digests=self.digests[part])


@dataclass(frozen=True, eq=False)
class Dataset:
    """An opened data set, or one of its chapters. Documents are numbered across all shards, and so are blocks.

    Attributes:
        manifest: the manifest with only the shards that are open.
        store: the folder of the data set.
        offsets: (documents + 1,) int64, where each document begins in the data set, in tokens, and the end.
        blocks: (blocks + 1,) int64, the first document of each block, and the number of documents.
        block_shards: (blocks,) int32, the shard that each block lies in.
        shard_starts: (shards,) int64, where each shard begins in the data set, in tokens.
        digests: the SHA-256 of each block's tokens.
        columns: the columns that documents have beside their tokens, by name.
        first_document: the number of its first document in the whole data set.
        reads: counts repeated reads.
    """

    manifest: DatasetManifest
    store: Store
    offsets: NDArray[np.int64]
    blocks: NDArray[np.int64]
    block_shards: NDArray[np.int32]
    shard_starts: NDArray[np.int64]
    digests: list[bytes]
    columns: Mapping[str, StoredColumn] = field(default_factory=dict[str, StoredColumn])
    first_document: int = 0
    reads: Reads = field(default_factory=Reads)

    @property
    def block_sources(self) -> NDArray[np.int32]:
        """(blocks,) int32, the source that each block's documents come from."""
        return np.array([shard.source for shard in self.manifest.shards], np.int32)[self.block_shards]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(documents,) int64, tokens of each document."""
        return np.diff(self.offsets)

    def block(self, number: int) -> "Dataset":
        """A data set that holds only this block."""
        first, last = self.blocks[number : number + 2].tolist()
        part = slice(number, number + 1)
        return replace(
            self,
            offsets=self.offsets[first : last + 1],
            blocks=np.array([0, last - first], np.int64),
            block_shards=self.block_shards[part],
            digests=self.digests[part],
            columns={name: column.block(number) for name, column in self.columns.items()},
            first_document=self.first_document + first,
        )

    def read(self, numbers: NDArray[np.int64]) -> ReadBlocks:
        """The blocks with these `numbers`, which must be ascending.

        Raises:
            StorageError: a block is not what was written, also after a second attempt, or the store is out of reach.
        """
        by_shard: dict[int, list[int]] = {}
        for block in numbers.tolist():
            by_shard.setdefault(int(self.block_shards[block]), []).append(block)
        with ThreadPoolExecutor(_READERS) as pool:
            # Blocks of a shard follow each other, and so do the shards. So the parts are in the order of the numbers.
            parts = [part for shard in pool.map(self._read_tokens, by_shard, by_shard.values()) for part in shard]
            columns = {
                name: [
                    part
                    for shard in pool.map(partial(self._read_column, name), by_shard, by_shard.values())
                    for part in shard
                ]
                for name in self.columns
            }
        return ReadBlocks(self, numbers, [np.frombuffer(part, TOKEN) for part in parts], columns)

    def documents(self, block: int) -> list[NDArray[np.uint32]]:
        """The tokens of each document of one block. Raises as `read`."""
        read = self.read(np.array([block]))
        return [read.gather(np.array([number])) for number in range(*self.blocks[block : block + 2].tolist())]

    def _read_tokens(self, shard: int, blocks: list[int]) -> list[Buffer]:
        shard_start = self.shard_starts[shard]
        starts = (self.offsets[self.blocks[blocks]] - shard_start) * TOKEN.itemsize
        ends = (self.offsets[self.blocks[np.array(blocks) + 1]] - shard_start) * TOKEN.itemsize
        digests = [self.digests[block] for block in blocks]
        return self._read(self.manifest.shards[shard].tokens_file.key, starts, ends, digests)

    def _read_column(self, name: str, shard: int, blocks: list[int]) -> list[NDArray[Any]]:
        column = self.columns[name]
        dtype, shape = np.dtype(column.record.dtype), column.record.shape
        size = dtype.itemsize * prod(shape)
        starts, ends = column.begins[blocks] * size, column.ends[blocks] * size
        found = self._read(column.files[shard], starts, ends, [column.digests[block] for block in blocks])
        return [np.frombuffer(part, dtype).reshape(-1, *shape) for part in found]

    def _read(
        self, key: str, starts: NDArray[np.int64], ends: NDArray[np.int64], digests: Sequence[bytes]
    ) -> list[Buffer]:
        def damaged(start: int, end: int) -> Damaged:
            return Damaged(
                f"{self.store.uri}/{key}: bytes {start} to {end} are not what was written (their SHA-256 "
                f"differs). Delete {self.store.uri}, and what it has is made again."
            )

        return self.reads.proven(self.store, key, starts.tolist(), ends.tolist(), digests, damaged)


def open_dataset(store: Store, fingerprint: str) -> Dataset:
    """Open a whole compiled data set. `store` is the root that runs share. Reads all lengths, but no tokens.

    Raises:
        NotFound: it does not exist, or its manifest was not written yet.
        StorageError: it is damaged, or of another format.
    """
    manifest = read_manifest(store, fingerprint)
    return _open_shards(store, manifest, manifest.shards, 0)


def open_chapter(store: Store, fingerprint: str, chapter: int) -> Dataset:
    """Open one chapter of a data set; others may not be compiled yet.

    Raises:
        NotFound: the chapter is not compiled yet.
        StorageError: it is damaged, or of another format.
    """
    manifest = read_manifest(store, fingerprint, chapter)
    shards = [shard for shard in manifest.shards if shard.chapter == chapter]
    before = sum(shard.documents for shard in manifest.shards if shard.chapter < chapter)
    return _open_shards(store, manifest, shards, before)


def _open_shards(store: Store, manifest: DatasetManifest, shards: list[ShardRecord], before: int) -> Dataset:
    """A data set with only these `shards`. `before` is the number of documents before them."""
    folder = store.sub(layout.dataset(manifest.fingerprint))
    with ThreadPoolExecutor(_READERS) as pool:
        offsets = list(pool.map(reader(folder, OFFSET), [shard.documents_file for shard in shards]))
        blocks = list(pool.map(reader(folder, BLOCK), [shard.blocks_file for shard in shards]))
    for shard, ends, firsts in zip(shards, offsets, blocks, strict=True):
        _check_index(folder, shard, ends, firsts["document"])
    # offsets: for each shard (documents + 1,) uint64 in tokens; blocks: for each shard (blocks,) of `BLOCK`.
    lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(part.astype(np.int64)) for part in offsets)])
    documents = np.array([shard.documents for shard in shards], np.int64)
    firsts = np.cumsum(documents) - documents
    starts = [first + part["document"].astype(np.int64) for first, part in zip(firsts, blocks, strict=True)]
    ends_of_documents = np.concatenate([[0], np.cumsum(lengths)])
    return Dataset(
        manifest=manifest.model_copy(update={"shards": shards}),
        store=folder.failing_fast(),
        offsets=ends_of_documents,
        blocks=np.concatenate([*starts, [documents.sum()]]),
        block_shards=np.repeat(
            np.arange(len(blocks), dtype=np.int32), np.array([len(part) for part in blocks], np.int64)
        ),
        shard_starts=ends_of_documents[firsts],
        digests=[digest.tobytes() for part in blocks for digest in part["sha256"]],
        columns={name: _open_column(folder, name, shards, list(map(len, blocks))) for name in _columns_of(shards)},
        first_document=before,
    )


def _columns_of(shards: list[ShardRecord]) -> Mapping[str, ColumnRecord]:
    return (shards[0].columns or {}) if shards else {}


def _open_column(folder: Store, name: str, shards: list[ShardRecord], blocks: list[int]) -> StoredColumn:
    """The column of these shards. `blocks` is the number of blocks in each shard."""
    begins, ends, files, digests = list[NDArray[np.int64]](), list[NDArray[np.int64]](), list[str](), list[bytes]()
    record = _columns_of(shards)[name]
    for shard, count in zip(shards, blocks, strict=True):
        assert shard.columns is not None  # the manifest guarantees it
        own = shard.columns[name]
        index = reader(folder, COLUMN_BLOCK)(own.blocks_file)
        size = np.dtype(own.dtype).itemsize * prod(own.shape)
        places = np.append(index["value"].astype(np.int64), own.values_file.size // size)
        if len(index) != count or places[0] != 0 or (np.diff(places) < 0).any():
            raise damaged(f"{folder.uri}/{own.blocks_file.key}", "its blocks do not follow each other")
        begins.append(places[:-1])
        ends.append(places[1:])
        files.append(own.values_file.key)
        digests += [digest.tobytes() for digest in index["sha256"]]
    return StoredColumn(record, files, np.concatenate(begins), np.concatenate(ends), digests)


def reader(folder: Store, dtype: np.dtype) -> Callable[[FileRecord], NDArray]:
    """A function that reads a binary file of a data set as a whole.

    It raises `Damaged` if the file is not what was written.
    """

    @read_twice
    def read(file: FileRecord) -> NDArray:
        where = f"{folder.uri}/{file.key}"
        try:
            data = folder.get(file.key)
        except NotFound as error:  # a caller would take it for a data set that is not compiled yet, and wait
            raise damaged(where, "it does not exist") from error
        if len(data) != file.size or hashlib.sha256(data).hexdigest() != file.sha256:
            raise damaged(where, "it is not what was written: its SHA-256 differs")
        return np.frombuffer(data, dtype)

    return read


def _check_index(folder: Store, shard: ShardRecord, offsets: NDArray[np.uint64], firsts: NDArray[np.uint64]) -> None:
    """Raises `Damaged` unless documents and blocks follow each other from the shard's first token to its last.

    `offsets` (documents + 1,) say where its documents begin, in tokens, and where the last ends. `firsts` (blocks,) is
    the first document of each block.
    """
    borders = np.append(firsts, np.uint64(shard.documents))
    whole = offsets[0] == 0 and offsets[-1] == shard.tokens and borders[0] == 0
    if not whole or (offsets[1:] <= offsets[:-1]).any() or (borders[1:] <= borders[:-1]).any():
        raise damaged(f"{folder.uri}/{shard.documents_file.key}", "its documents or blocks do not follow each other")


def write_shard(folder: Store, suffix: str, tokens: NDArray[np.uint32], offsets: NDArray[np.int64]) -> dict[str, Any]:
    """Write the files that every shard has. Returns their records, by the fields of `ShardRecord`.

    `offsets` (documents + 1,) say where its documents begin.
    """
    contents = {"tokens": tokens.astype(TOKEN), "documents": offsets.astype(OFFSET), "blocks": _blocks(tokens, offsets)}
    return {
        f"{kind}_file": FileRecord.put(folder, f"{kind}-{suffix}.bin", values.tobytes())
        for kind, values in contents.items()
    }


def write_column(
    folder: Store,
    suffix: str,
    column: Column,
    values: NDArray[Any],
    tokens: NDArray[np.uint32],
    offsets: NDArray[np.int64],
    counts: NDArray[Any] | None = None,
) -> ColumnRecord:
    """Write the `values` of a column, (values, *shape), for a shard with these `tokens` and `offsets`.

    `counts` (documents,) are the pictures of each document, for a column of pictures."""
    before = {
        "picture": np.concatenate([[0], np.cumsum([] if counts is None else counts, dtype=np.int64)]),
        "document": np.arange(len(offsets)),
        "token": offsets,
        "target": np.concatenate([[0], np.cumsum(tokens >= TARGET_BIT)])[offsets],
    }[column.per]
    firsts = before[_firsts(offsets)]
    index = np.empty(len(firsts) - 1, COLUMN_BLOCK)
    index["value"] = firsts[:-1]
    stored = values.astype(np.dtype(column.dtype).newbyteorder("<"))
    index["sha256"] = [
        np.void(hashlib.sha256(stored[begin:end].tobytes()).digest()) for begin, end in pairwise(firsts.tolist())
    ]
    return ColumnRecord(
        dtype=stored.dtype.str,
        per=column.per,
        shape=list(column.shape),
        values_file=FileRecord.put(folder, f"column-{column.name}-{suffix}.bin", stored.tobytes()),
        blocks_file=FileRecord.put(folder, f"column-{column.name}-blocks-{suffix}.bin", index.tobytes()),
    )


def _firsts(offsets: NDArray[np.int64]) -> list[int]:
    """The first document of each block of a shard, then the number of all documents."""
    firsts = [0]
    while firsts[-1] < len(offsets) - 1:
        fitting = int(np.searchsorted(offsets, offsets[firsts[-1]] + BLOCK_TOKENS, side="right")) - 1
        firsts.append(max(firsts[-1] + 1, min(firsts[-1] + BLOCK_DOCUMENTS, fitting)))
    return firsts


def _blocks(tokens: NDArray[np.uint32], offsets: NDArray[np.int64]) -> NDArray[np.void]:
    """The blocks of a shard, (blocks,) of `BLOCK`."""
    firsts = _firsts(offsets)
    blocks = np.empty(len(firsts) - 1, BLOCK)
    blocks["document"] = firsts[:-1]
    parts = (tokens[begin:end] for begin, end in pairwise(offsets[firsts].tolist()))
    blocks["sha256"] = [np.void(hashlib.sha256(part.astype(TOKEN).tobytes()).digest()) for part in parts]
    return blocks
