"""Compiles rows into token shards, once for all runs that use the same data in the same way.

The fingerprint names the result before it exists, because it covers everything that decides a token. Rows are encoded
on all cores and written in their order, so the result is the same on any machine. Two racing compilations write the
same bytes, and a killed one continues after its last shard. Only a manifest makes the result valid.

A large data set is compiled in chapters. Each takes the same share of every source, so that all have the same mixture
and training can begin with the first.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

from trainer.base.base import Tokenizer
from trainer.config import Data
from trainer.data.compile.encode import Encoder, nothing_to_train, untagged_note
from trainer.data.compile.fingerprint import count_chapters
from trainer.data.compile.pool import Mapper, mapper_for
from trainer.data.compile.shards import Place, ShardWriter
from trainer.data.dataset.manifest import FORMAT, MANIFEST, DatasetManifest, LeftOut, SourceRecord, chapter_key
from trainer.data.source.files import SourceFile
from trainer.data.source.held_out import EVERYTHING, Part
from trainer.data.source.reading import batches
from trainer.data.source.rows import Batch
from trainer.errors import AlreadyExists, DataError
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

    start = partial(Encoder, data, tokenizer, part)
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
