"""Writes token shards, and a journal with which a killed compilation continues after its last shard."""

import numpy as np
from numpy.typing import NDArray

from trainer.data.compile.encode import BAD_ROWS_SHOWN, Encoded
from trainer.data.dataset.binary import HASH, ID_BITS
from trainer.data.dataset.dataset import SHARD_TOKENS, write_column, write_shard
from trainer.data.dataset.manifest import (
    Count,
    Counters,
    FileRecord,
    LeftOut,
    Record,
    ShardRecord,
    add_left_out,
    chapter_key,
    read_record,
)
from trainer.data.order.order import splitmix64
from trainer.errors import Damaged, NotFound
from trainer.store.store import Store


class Place(Record):
    """The place where a compilation continues to read a source: batch `batch` of its file `file`, both from 0."""

    file: Count = 0
    batch: Count = 0


class JournalEntry(Record):
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
        columns = {
            column.name: write_column(
                self._folder,
                suffix,
                column,
                np.concatenate([batch.columns[column] for batch in self._batches]),
                tokens,
                offsets,
            )
            for column in self._batches[0].columns
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
        every = [hash_documents(batch.tokens, batch.lengths) for batch in self._batches]
        return np.concatenate(every).astype(HASH)


def _journal(shard: int) -> str:
    return f"progress-{shard:05d}.json"


def hash_documents(tokens: NDArray[np.uint32], lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A hash of each document's tokens and of their order, (documents,). `tokens` has all documents end to end.

    The hash does not depend on which tokens are trained, or on which answer of a pair is the better one."""
    if not len(lengths):
        return np.zeros(0, np.uint64)
    starts = np.cumsum(lengths) - lengths
    places = np.arange(len(tokens)) - np.repeat(starts, lengths)
    return np.add.reduceat(splitmix64((tokens & ID_BITS) + (places.astype(np.uint64) << np.uint64(32))), starts)
