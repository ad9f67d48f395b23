"""Compiles rows into token shards, once for all runs that use the same data in the same way.

The fingerprint names the result before it exists: it covers everything that decides a token. Compiling is sequential
and holds one shard in memory. Nothing counts before the manifest is there, so a killed compilation is simply repeated,
and of two racing ones both write the same bytes.
"""

import contextlib
import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trainer import run_layout
from trainer.config import Data
from trainer.data.chat import Example, Renderer, template_text
from trainer.data.dataset import (
    BLOCK_DOCUMENTS,
    FORMAT,
    MANIFEST,
    OFFSET,
    TARGET_BIT,
    TOKEN,
    Counters,
    Dataset,
    FileRecord,
    Manifest,
    ShardRecord,
    SourceRecord,
    open_dataset,
)
from trainer.data.sources import SourceFile, rows
from trainer.errors import AlreadyExists, DataError
from trainer.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHARD_TOKENS = 64 * 2**20 // TOKEN.itemsize
_BAD_ROWS_SHOWN = 20
_PROGRESS_ROWS = 1000
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class Progress:
    """How far a compilation is; `rows`, `documents` and `tokens` are what was read and kept so far."""

    files_done: int
    files: int
    rows: int
    documents: int
    tokens: int


def hash_tokenizer(directory: Path) -> dict[str, str]:
    """SHA-256 of each of the files in a Hugging Face model directory that decide what a tokenizer does."""
    files = [directory / name for name in _TOKENIZER_FILES if (directory / name).is_file()]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def fingerprint(data: Data, files: Sequence[SourceFile], tokenizer_files: Mapping[str, str]) -> str:
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
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:20]


def compile_dataset(
    data: Data,
    files: Sequence[SourceFile],
    tokenizer: "PreTrainedTokenizerBase",
    store: Store,
    fingerprint: str,
    progress: Callable[[Progress], None] | None = None,
) -> Dataset:
    """Compile `files` into `store` and open the result; what is there already is opened as it is.

    `store` is the root that runs share, `fingerprint` comes from the function of that name.

    Raises:
        ConfigError: the tokenizer cannot serve `data.format`.
        DataError: a row cannot be used and the settings say fail, a file changed meanwhile, or no row is trainable.
        StorageError: a source or the store failed.
    """
    folder = store.sub(run_layout.dataset(fingerprint))
    if folder.exists(MANIFEST):
        return open_dataset(store, fingerprint)
    triage = _Triage(data, Renderer(tokenizer, data))
    shards = _ShardWriter(folder)
    counters = triage.counters

    def report(files_done: int) -> None:
        if progress is not None:
            progress(Progress(files_done, len(files), counters.rows, shards.documents, shards.tokens))

    for files_done, file in enumerate(files):
        for example in triage.documents(file, partial(report, files_done)):
            shards.add(file.source, example)
        if file.store.head(file.key).version != file.version:
            raise DataError(f"{file.uri}: changed while it was read. Start again when it is complete.")
        report(files_done + 1)
    shards.close()
    if not shards.records:
        raise DataError(_nothing_to_train(counters))
    _commit(folder, _manifest(fingerprint, files, shards.records, triage))
    return open_dataset(store, fingerprint)


class _Triage:
    """Decides which rows become documents, and counts the others."""

    def __init__(self, data: Data, renderer: Renderer) -> None:
        self.counters = Counters()
        self.bad_rows: list[str] = []
        self._data = data
        self._renderer = renderer

    def documents(self, file: SourceFile, report: Callable[[], None]) -> Iterator[Example]:
        """The documents of a file, with a report every so many rows."""
        for where, row in rows(file, self._bad):
            try:
                example = self._renderer.encode(row)
            except DataError as error:
                self._bad(DataError(f"{where}: {error}"))
                continue
            self.counters.rows += 1
            example = self._fit(where, example)
            if example is not None:
                yield example
            if self.counters.rows % _PROGRESS_ROWS == 0:
                report()

    def _bad(self, error: DataError) -> None:
        if self._data.on_bad_row == "fail":
            raise DataError(f"{error}. Correct the row, or set data.on_bad_row: skip.") from error
        self.counters.rows += 1
        self.counters.bad_rows += 1
        if len(self.bad_rows) < _BAD_ROWS_SHOWN:
            self.bad_rows.append(str(error))

    def _fit(self, where: str, example: Example) -> Example | None:
        """The example cut to the sequence length, or None where it is dropped or trains nothing."""
        limit = self._data.sequence_length
        if len(example.tokens) > limit:
            match self._data.on_too_long:
                case "fail":
                    raise DataError(
                        f"{where}: {len(example.tokens)} tokens, but data.sequence_length is {limit}. Raise it, or set "
                        "data.on_too_long to truncate or drop."
                    )
                case "drop":
                    self.counters.dropped += 1
                    return None
                case "truncate":
                    self.counters.truncated += 1
                    example = Example(example.tokens[:limit], example.targets[:limit])
        if not any(example.targets):
            self.counters.without_targets += 1
            return None
        return example


class _ShardWriter:
    """Collects documents, and writes a shard when it is full or its source ends."""

    def __init__(self, folder: Store) -> None:
        self.records: list[ShardRecord] = []
        self.documents = 0
        self.tokens = 0
        self._folder = folder
        self._start(source=0)

    def _start(self, source: int) -> None:
        self._source = source
        self._tokens = bytearray()
        self._offsets = array("Q", [0])
        self._targets = 0

    def add(self, source: int, example: Example) -> None:
        if source != self._source or self._offsets[-1] + len(example.tokens) > SHARD_TOKENS:
            self.close()
            self._start(source)
        tokens = np.array(example.tokens, TOKEN)
        tokens[np.array(example.targets)] |= TARGET_BIT
        self._tokens += tokens.tobytes()
        self._offsets.append(self._offsets[-1] + len(tokens))
        self._targets += sum(example.targets)
        self.documents += 1
        self.tokens += len(tokens)

    def close(self) -> None:
        """Write the documents collected so far, if there are any."""
        if len(self._offsets) == 1:
            return
        offsets = np.array(self._offsets, OFFSET)
        number = len(self.records)
        self.records.append(
            ShardRecord(
                source=self._source,
                documents=len(offsets) - 1,
                tokens=int(offsets[-1]),
                targets=self._targets,
                tokens_file=self._put(f"tokens-{number:05d}.bin", bytes(self._tokens)),
                documents_file=self._put(f"documents-{number:05d}.bin", offsets.tobytes()),
                blocks_file=self._put(f"blocks-{number:05d}.bin", self._digests(offsets)),
            )
        )
        self._start(self._source)

    def _digests(self, offsets: np.ndarray) -> bytes:
        borders = [*offsets[:-1:BLOCK_DOCUMENTS].tolist(), int(offsets[-1])]
        view = memoryview(self._tokens)
        blocks = (view[a * TOKEN.itemsize : b * TOKEN.itemsize] for a, b in pairwise(borders))
        return b"".join(hashlib.sha256(block).digest() for block in blocks)

    def _put(self, key: str, content: bytes) -> FileRecord:
        self._folder.put(key, content)
        return FileRecord(key=key, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def _manifest(fingerprint: str, files: Sequence[SourceFile], shards: list[ShardRecord], triage: _Triage) -> Manifest:
    sources = [SourceRecord() for _ in range(files[-1].source + 1)]
    for file in files:
        sources[file.source].files.append(file.uri)
    for shard in shards:
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
        shards=shards,
        counters=triage.counters,
        bad_rows=triage.bad_rows,
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
