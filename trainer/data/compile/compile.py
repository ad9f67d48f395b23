"""Compiles rows into token shards, once for all runs that use the same data in the same way.

The fingerprint names the result before it exists, because it covers everything that decides a token. Rows are encoded
on all cores and written in their order, so the result is the same on any machine. Two racing compilations write the
same bytes, and a killed one continues after its last shard, as its journal says. Only a manifest makes the result
valid.

A large data set is compiled in chapters. Each takes the same share of every source, so that all have the same mixture
and training can begin with the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.base.base import Tokenizer
from trainer.config import Data
from trainer.data.compile.encode import BAD_ROWS_SHOWN, BatchEncoder, Encoded, nothing_to_train, untagged_note
from trainer.data.compile.fingerprint import count_chapters
from trainer.data.compile.pool import Mapper, mapper_for
from trainer.data.dataset.dataset import HASH, ID_BITS, SHARD_TOKENS, write_column, write_shard
from trainer.data.dataset.manifest import (
    FORMAT,
    MANIFEST,
    Count,
    Counters,
    DatasetManifest,
    FileRecord,
    LeftOut,
    SealedRecord,
    ShardRecord,
    SourceRecord,
    add_left_out,
    chapter_key,
    read_record,
)
from trainer.data.dataset.pictures import PictureWriter, entries_in
from trainer.data.format.row_format import COUNTED, PICTURES, Column
from trainer.data.order.order import splitmix64
from trainer.data.source.files import SourceFile
from trainer.data.source.reading import EVERYTHING, Part, batches
from trainer.data.source.rows import Batch
from trainer.errors import AlreadyExists, Damaged, DataError, NotFound
from trainer.run import layout
from trainer.store.store import Store


@dataclass(frozen=True)
class Progress:
    """The progress of a compilation, in bytes of its sources, and the rows, documents and tokens so far.

    The last report has `left_out`: what rows carry but their text does not contain. The first has `forms`: how the rows
    of each source are read, if Capstan detected it. `notes` are sentences about the data for the user.
    """

    bytes_done: int
    bytes: int
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)
    forms: Sequence[str] = ()
    notes: Sequence[str] = ()


def compile_chapters(
    data: Data,
    files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    store: Store,
    fingerprint: str,
    part: Part = EVERYTHING,
    mapper: Mapper | None = None,
    progress: Callable[[Progress], None] = lambda now: None,
) -> Iterator[int]:
    """Compile `files` into `store`. Yields the number of each chapter as soon as it can be opened, in order from 0.

    Chapters that are already there stay. `store` is the root that runs share, `fingerprint` comes from the function of
    that name. `mapper` encodes the batches; the default is that of `mapper_for`. It is called once for each chapter,
    and no call is in progress while the caller handles a number.

    Raises:
        ConfigError: the tokenizer cannot serve `data.format`.
        DataError: a row cannot be used and the settings say fail, a file changed meanwhile, or no row is trainable.
        StorageError: a source or the store failed.
    """
    folder, chapters = store.sub(layout.dataset(fingerprint)), count_chapters(files)
    if folder.exists(MANIFEST):
        yield from range(chapters)
        return
    writer = ShardWriter(folder, files[-1].source + 1)
    yield from range(writer.chapter)  # chapters that a killed compilation committed
    size = sum(file.size for file in files)

    def report(bytes_done: int, left_out: Mapping[str, LeftOut] | None = None, notes: Sequence[str] = ()) -> None:
        rows, documents, tokens = writer.counters.rows, writer.documents, writer.tokens
        progress(Progress(bytes_done, size, rows, documents, tokens, left_out or {}, notes=notes))

    start = partial(BatchEncoder, data, tokenizer, part.over(files), PictureWriter(folder))
    for chapter, work in groupby(_read(files, chapters, writer.next), lambda batch: batch[1].chapter):
        while writer.chapter < chapter:
            writer.close()
            _commit(folder, chapter_key(writer.chapter), _manifest(fingerprint, files, writer))
            yield writer.chapter
            writer.chapter += 1
        for encoded, at in (mapper or mapper_for(size))(work, start):
            if encoded.error:
                raise DataError(encoded.error)
            writer.add(at.source, encoded, at.after)
            report(at.bytes_done)
    writer.close()
    if not writer.shards:
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise DataError(nothing_to_train(f"{files[0].uri}{more}", writer.counters))
    _commit(folder, MANIFEST, _manifest(fingerprint, files, writer))
    writer.forget()
    report(size, writer.left_out, untagged_note(writer.counters.untagged))
    yield from range(writer.chapter, chapters)


@dataclass(frozen=True)
class _At:
    """Where a batch lies: its source and chapter, the place after it, and the bytes read so far.

    The bytes are those of its source, or of all sources.
    """

    source: int
    chapter: int
    after: Place
    bytes_done: int


def _read(files: Sequence[SourceFile], chapters: int, starts: Sequence[Place]) -> Iterator[tuple[Batch, _At]]:
    """Yield every batch chapter by chapter, and source by source in each chapter.

    `starts` has the place in each source at which to begin.
    """
    owned = [[file for file in files if file.source == source] for source in range(len(starts))]
    readers = [_read_source(own, chapters, start) for own, start in zip(owned, starts, strict=True)]
    ahead = [next(reader, None) for reader in readers]
    done = [sum(file.size for file in own[: start.file]) for own, start in zip(owned, starts, strict=True)]
    for chapter in range(chapters):
        for source, reader in enumerate(readers):
            while (item := ahead[source]) and item[1].chapter == chapter:
                batch, at = item
                done[source] = at.bytes_done
                yield batch, replace(at, bytes_done=sum(done))
                ahead[source] = next(reader, None)


def _read_source(files: Sequence[SourceFile], chapters: int, start: Place) -> Iterator[tuple[Batch, _At]]:
    """The batches of one source from `start` on. Raises `DataError` if a file has changed since it was found."""
    size = max(1, sum(file.size for file in files))
    before = sum(file.size for file in files[: start.file])
    for number, file in enumerate(files[start.file :], start.file):
        skipped, read = start.batch if number == start.file else 0, 0
        for index, batch in enumerate(batches(file)):
            if index >= skipped:
                # Use the position before the batch: after the last one it equals the size, which would give one chapter
                # too many.
                chapter = min(chapters * (before + read) // size, chapters - 1)
                yield batch, _At(file.source, chapter, Place(file=number, batch=index + 1), before + batch.read)
            read = batch.read
        if file.changed():
            raise DataError(f"{file.uri}: changed while it was read. Start again when it is complete.")
        before += file.size


def _manifest(fingerprint: str, files: Sequence[SourceFile], writer: ShardWriter) -> DatasetManifest:
    """The manifest of all chapters so far."""
    sources = [SourceRecord() for _ in range(files[-1].source + 1)]
    for file in files:
        sources[file.source].files.append(file.uri)
    for shard in writer.shards:
        source = sources[shard.source]
        source.documents += shard.documents
        source.tokens += shard.tokens
        source.targets += shard.targets
    return DatasetManifest(
        format=FORMAT,
        fingerprint=fingerprint,
        chapters=count_chapters(files),
        documents=sum(source.documents for source in sources),
        tokens=sum(source.tokens for source in sources),
        targets=sum(source.targets for source in sources),
        sources=sources,
        shards=writer.shards,
        counters=writer.counters,
        bad_rows=writer.bad_rows,
        left_out=writer.left_out or None,
    )


def _commit(folder: Store, key: str, manifest: DatasetManifest) -> None:
    # Another writer of the same fingerprint may have been faster, with the same bytes.
    with contextlib.suppress(AlreadyExists):
        folder.create(key, manifest.sealed())


class Place(SealedRecord):
    """The place where a compilation continues to read a source: batch `batch` of its file `file`, both from 0."""

    file: Count = 0
    batch: Count = 0


class JournalEntry(SealedRecord):
    """The state after a shard, from which a compilation can continue. `next` has the place in each source."""

    shard: ShardRecord
    next: list[Place]
    counters: Counters
    bad_rows: list[str]
    left_out: dict[str, LeftOut] | None = None


class ShardWriter:
    """Collects encoded batches of one source after another, chapter after chapter, into shards.

    Shards consist of whole batches, so that a compilation can continue at a batch.
    """

    def __init__(self, folder: Store, sources: int) -> None:
        self.counters = Counters()
        self.bad_rows: list[str] = []
        self.left_out: dict[str, LeftOut] = {}
        self.shards: list[ShardRecord] = []
        self.next = [Place()] * sources
        self._folder = folder
        self._resume()
        self._source = 0
        self.chapter = self.shards[-1].chapter if self.shards else 0
        self._start()

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards) + sum(len(batch.lengths) for batch in self._batches)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards) + self._tokens

    def _start(self) -> None:
        self._batches: list[Encoded] = []
        self._tokens = 0

    def _resume(self) -> None:
        """Continue after the last shard that the journal lists without a gap. Damaged shards are compiled again."""
        while True:
            key = _journal(len(self.shards))
            try:
                entry = read_record(JournalEntry, self._folder, key)
            except (NotFound, Damaged):
                return
            if len(entry.next) != len(self.next):
                return
            self.shards.append(entry.shard)
            self.next, self.counters, self.bad_rows = entry.next, entry.counters, entry.bad_rows
            self.left_out = entry.left_out or {}

    def add(self, source: int, batch: Encoded, after: Place) -> None:
        """Take the documents and the counts of the chapter's next batch. `after` is the next place in its source."""
        if source != self._source or self._tokens + len(batch.tokens) > SHARD_TOKENS:
            self.close()
            self._source = source
        self._batches.append(batch)
        self._tokens += len(batch.tokens)
        self.counters = self.counters.plus(batch.counters)
        self.bad_rows = [*self.bad_rows, *batch.bad_rows][:BAD_ROWS_SHOWN]
        add_left_out(self.left_out, batch.left_out)
        self.next[source] = after

    def close(self) -> None:
        """Write the documents collected so far, if there are any, and note in the journal that they are written."""
        if self._tokens:
            number = len(self.shards)
            self.shards.append(self._write(number))
            entry = JournalEntry(
                shard=self.shards[-1],
                next=self.next,
                counters=self.counters,
                bad_rows=self.bad_rows,
                left_out=self.left_out or None,
            )
            self._folder.put(_journal(number), entry.sealed())
        self._start()

    def forget(self) -> None:
        """Remove the journal and the manifests of single chapters. The manifest of the whole data set replaces them."""
        for number in range(len(self.shards)):
            self._folder.delete(_journal(number))
        for chapter in range(self.chapter):
            self._folder.delete(chapter_key(chapter))

    def _write(self, number: int) -> ShardRecord:
        tokens = np.concatenate([batch.tokens for batch in self._batches])
        lengths = np.concatenate([batch.lengths for batch in self._batches])
        offsets, suffix = np.concatenate([[0], np.cumsum(lengths)]), f"{number:05d}"
        values = {
            column: np.concatenate([batch.columns[column] for batch in self._batches])
            for column in self._batches[0].columns
        }
        counts = next((found for column, found in values.items() if column.name == COUNTED), None)
        columns = {
            column.name: write_column(self._folder, suffix, column, found, tokens, offsets, counts)
            for column, found in values.items()
        }
        return ShardRecord(
            source=self._source,
            chapter=self.chapter,
            documents=len(lengths),
            tokens=len(tokens),
            targets=sum(batch.targets for batch in self._batches),
            **write_shard(self._folder, suffix, tokens, offsets),
            hashes_file=FileRecord.put(self._folder, f"hashes-{suffix}.bin", self._hashes().tobytes()),
            columns=columns or None,
        )

    def _hashes(self) -> NDArray[np.uint64]:
        """Hash one batch at a time, because hashing takes several times the memory of the tokens."""
        every = [hash_documents(batch.tokens, batch.lengths, batch.columns) for batch in self._batches]
        return np.concatenate(every).astype(HASH)


def _journal(shard: int) -> str:
    return f"progress-{shard:05d}.json"


def hash_documents(
    tokens: NDArray[np.uint32], lengths: NDArray[np.int64], columns: Mapping[Column, NDArray[Any]]
) -> NDArray[np.uint64]:
    """A hash of each document's tokens and pictures, and of their order, (documents,). `tokens` and `columns` have all
    documents end to end.

    The hash does not depend on which tokens are trained, or on which answer of a pair is the better one."""
    if not len(lengths):
        return np.zeros(0, np.uint64)
    starts = np.cumsum(lengths) - lengths
    places = np.arange(len(tokens)) - np.repeat(starts, lengths)
    hashes = np.add.reduceat(splitmix64((tokens & ID_BITS) + (places.astype(np.uint64) << np.uint64(32))), starts)
    named = {column.name: values for column, values in columns.items()}
    if PICTURES in named:  # pictures of one size have the same tokens
        entries = entries_in(named[PICTURES])
        seen = splitmix64(np.frombuffer(entries["sha256"].tobytes(), "<u8")[::4] + entries["begin"].astype(np.uint64))
        np.add.at(hashes, np.repeat(np.arange(len(lengths)), named[COUNTED]), seen)
    return hashes
