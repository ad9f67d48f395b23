"""Compiles rows into token shards, once for all runs that use the same data in the same way.

The fingerprint names the result before it exists: it covers everything that decides a token. Rows are encoded on all
cores and written in their order, so the result is the same on any machine: of two racing compilations both write the same
bytes, and a killed one goes on after its last shard. Nothing counts before the manifest is there.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from trainer import run_layout
from trainer.base import TOKENIZER_FILES
from trainer.config import Data
from trainer.data.chat import template_text
from trainer.data.dataset import FORMAT, MANIFEST, Counters, Dataset, Manifest, SourceRecord, open_dataset
from trainer.data.encode import EVERYTHING, Encoder, Part
from trainer.data.pool import Mapper, mapper_for
from trainer.data.rows import Batch, batches
from trainer.data.shards import Place, ShardWriter
from trainer.data.sources import SourceFile
from trainer.errors import AlreadyExists, DataError
from trainer.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Progress:
    """How far a compilation is, in bytes of its sources; the others are what was read and kept so far."""

    bytes_done: int
    bytes: int
    rows: int
    documents: int
    tokens: int


def hash_tokenizer(directory: Path) -> dict[str, str]:
    """SHA-256 of each of the files in a Hugging Face model directory that decide what a tokenizer does."""
    files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def fingerprint(
    data: Data, files: Sequence[SourceFile], tokenizer_files: Mapping[str, str], part: Part = EVERYTHING
) -> str:
    """20 hex digits that change with the sources' content, the tokenizer, the template or a setting that matters.

    `tokenizer_files` comes from `hash_tokenizer`. Weights and packing belong to the epoch's plan and are not in it.

    Raises:
        ConfigError: `data.template` cannot be read.
    """
    inputs = {
        "format_version": FORMAT,
        "sources": [[file.source, file.uri, file.version, file.size] for file in files],
        "tokenizer": dict(tokenizer_files),
        "template": template_text(data),
        "settings": data.model_dump(include={"format", "fields", "sequence_length", "on_too_long", "on_bad_row"}),
        "targets": data.targets,
        "part": [part.fraction, part.seed, part.held_out],
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:20]


def compile_dataset(
    data: Data,
    files: Sequence[SourceFile],
    tokenizer: "PreTrainedTokenizerBase",
    store: Store,
    fingerprint: str,
    part: Part = EVERYTHING,
    mapper: Mapper | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Dataset:
    """Compile `files` into `store` and open the result; what is there already is opened as it is.

    `store` is the root that runs share, `fingerprint` comes from the function of that name. `mapper` encodes the
    batches, by default as `mapper_for` says.

    Raises:
        ConfigError: the tokenizer cannot serve `data.format`.
        DataError: a row cannot be used and the settings say fail, a file changed meanwhile, or no row is trainable.
        StorageError: a source or the store failed.
    """
    folder = store.sub(run_layout.dataset(fingerprint))
    if folder.exists(MANIFEST):
        return open_dataset(store, fingerprint)
    writer = ShardWriter(folder)
    size = sum(file.size for file in files)

    def report(bytes_done: int) -> None:
        if progress is not None:
            progress(Progress(bytes_done, size, writer.counters.rows, writer.documents, writer.tokens))

    start = partial(Encoder, data, tokenizer, part)
    for encoded, at in (mapper or mapper_for(size))(_read(files, writer.next), start):
        if encoded.error:
            raise DataError(encoded.error)
        writer.add(at.source, encoded, at.after)
        report(at.bytes_done)
    writer.close()
    if not writer.shards:
        raise DataError(_nothing_to_train(writer.counters))
    _commit(folder, _manifest(fingerprint, files, writer))
    writer.forget()
    report(size)
    return open_dataset(store, fingerprint)


@dataclass(frozen=True)
class _At:
    """Where a batch lies: its source, the place behind it, and how many bytes of all files were read by then."""

    source: int
    after: Place
    bytes_done: int


def _read(files: Sequence[SourceFile], start: Place) -> Iterator[tuple[Batch, _At]]:
    """Every batch from `start` on. Raises `DataError` for a file that is not what it was when it was found."""
    before = sum(file.size for file in files[: start.file])
    for number, file in enumerate(files[start.file :], start.file):
        skipped = start.batch if number == start.file else 0
        for index, batch in enumerate(islice(batches(file), skipped, None), skipped):
            yield batch, _At(file.source, Place(file=number, batch=index + 1), before + batch.read)
        if file.store.head(file.key).version != file.version:
            raise DataError(f"{file.uri}: changed while it was read. Start again when it is complete.")
        before += file.size


def _manifest(fingerprint: str, files: Sequence[SourceFile], writer: ShardWriter) -> Manifest:
    sources = [SourceRecord() for _ in range(files[-1].source + 1)]
    for file in files:
        sources[file.source].files.append(file.uri)
    for shard in writer.shards:
        source = sources[shard.source]
        source.documents += shard.documents
        source.tokens += shard.tokens
        source.targets += shard.targets
    return Manifest(
        format=FORMAT,
        fingerprint=fingerprint,
        documents=sum(source.documents for source in sources),
        tokens=sum(source.tokens for source in sources),
        targets=sum(source.targets for source in sources),
        sources=sources,
        shards=writer.shards,
        counters=writer.counters,
        bad_rows=writer.bad_rows,
    )


def _commit(folder: Store, manifest: Manifest) -> None:
    # Another writer of the same fingerprint may have been faster, with the same bytes.
    with contextlib.suppress(AlreadyExists):
        folder.create(MANIFEST, manifest.model_dump_json(indent=1).encode())


def _nothing_to_train(counters: Counters) -> str:
    return (
        f"data: none of the {counters.rows} rows can be trained on: {counters.bad_rows} bad rows, "
        f"{counters.without_targets} without a token to train, {counters.dropped} dropped as too long. "
        "Check data.format, data.fields, data.loss_on and data.sequence_length."
    )
