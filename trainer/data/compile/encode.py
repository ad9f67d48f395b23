"""Encodes batches of rows into tokens, and decides which rows become documents."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.base.base import Tokenizer
from trainer.config import Data
from trainer.config.row_kinds import ROW_KINDS
from trainer.data.dataset.dataset import TARGET_BIT, TOKEN
from trainer.data.dataset.manifest import Counters, LeftOut, add_left_out
from trainer.data.dataset.pictures import PictureWriter
from trainer.data.format.formats import RowForm, as_read, explicit_form, or_error
from trainer.data.format.row_format import COUNTED, PICTURES, Column, RowKind
from trainer.data.render.answers import one_kind
from trainer.data.render.document import Document, RowRenderer, Turn, reading
from trainer.data.source.reading import Part
from trainer.data.source.rows import Batch, Row, at, printable
from trainer.errors import DataError

BAD_ROWS_SHOWN = 20


@dataclass
class Encoded:
    """The documents of a batch.

    `tokens` (tokens,) uint32 are those of its documents end to end, with `TARGET_BIT` set on trained ones. `lengths`
    (documents,) is the number of tokens of each. `columns` has the columns of the kind of rows, for all documents end
    to end. `error` is the first row that ends the compilation, if any does.
    """

    tokens: NDArray[np.uint32]
    lengths: NDArray[np.int64]
    columns: dict[Column, NDArray[Any]] = field(default_factory=dict[Column, NDArray[Any]])
    counters: Counters = field(default_factory=Counters)
    bad_rows: list[str] = field(default_factory=list)
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    error: str | None = None

    @property
    def targets(self) -> int:
        return int(np.count_nonzero(self.tokens & TARGET_BIT))


def left_out_of(names: Iterable[str], where: str) -> dict[str, LeftOut]:
    """Count the fields `names`, which the row at `where` has and its text lacks, in a form that can be added up."""
    return {printable(name): LeftOut(rows=1, examples=[where]) for name in names}


class RowEncoder:
    """Encodes rows of any form with one tokenizer. Each form has a renderer of its own.

    `pictures` keeps the pictures of the rows, if they have any and are not only looked at."""

    def __init__(self, tokenizer: Tokenizer, data: Data, pictures: PictureWriter | None = None) -> None:
        self._tokenizer, self._data, self._pictures = tokenizer, data, pictures
        self._renderers: dict[RowForm, RowRenderer] = {}
        if data.format != "auto":
            self._renderer(explicit_form(data))

    def encode(self, form: RowForm, rows: Sequence[Row], uri: str) -> list[Document | DataError]:
        """Each document of some rows of the file `uri`, or what is wrong with the row. The error's text does not name
        the row's place."""
        read = [or_error(form.read, row) for row in rows]
        with reading(uri, self._pictures):
            encoded = iter(self._renderer(form).encode([row for row in read if not isinstance(row, DataError)]))
        return [row if isinstance(row, DataError) else next(encoded) for row in read]

    def turns(self, form: RowForm, row: Row) -> list[Turn]:
        """The turns of a row. Raises `DataError` if it is not of this form."""
        return self._renderer(form).turns(form.read(row))

    def pictures(self, form: RowForm, row: Row, uri: str) -> list[bytes]:
        """The bytes of the pictures of a row of the file `uri`. None for a row that cannot be read."""
        renderer: Any = self._renderer(form)
        with reading(uri):
            found = or_error(renderer.contents, row) if ROW_KINDS[form.kind].sees else []
        return [] if isinstance(found, DataError) else found

    def _renderer(self, form: RowForm) -> RowRenderer:
        if form not in self._renderers:
            self._renderers[form] = ROW_KINDS[form.kind].renderer(self._tokenizer, as_read(self._data, form))
        return self._renderers[form]


class _Fatal(Exception):
    """Raised for a row that ends the compilation."""


class BatchEncoder:
    """Turns batches into documents as the settings say, and counts the rows that became none.

    Raises `ConfigError` as `RowEncoder`.
    """

    def __init__(self, data: Data, tokenizer: Tokenizer, part: Part, pictures: PictureWriter | None = None) -> None:
        self._data = data
        self._rows, self._pictures = RowEncoder(tokenizer, data, pictures), pictures
        self._part = part

    def __call__(self, batch: Batch) -> Encoded:
        form = batch.form or explicit_form(self._data)
        kind: RowKind = ROW_KINDS[form.kind]
        result = Encoded(np.empty(0, TOKEN), np.empty(0, np.int64))
        documents: list[Document] = []
        try:
            rows = self._part.rows(batch, lambda error: self._bad(result, error))
            examples = self._rows.encode(form, [row for _, row in rows], batch.uri)
            for (where, _), example in zip(rows, examples, strict=True):
                if isinstance(example, DataError):
                    self._bad(result, at(where, example))
                else:
                    result.counters.rows += 1
                    add_left_out(result.left_out, left_out_of(example.left_out, where))
                    documents += self._documents(result, where, example)
        except _Fatal as error:
            result.error = str(error)
        stored = [document.stored() for document in documents]
        result.lengths = np.array([len(document) for document in stored], np.int64)
        result.tokens = np.concatenate([result.tokens, *stored])
        result.columns = {column: _joined(column, documents) for column in kind.columns}
        if self._pictures is not None:
            for column in kind.columns:
                if column.name == PICTURES:
                    result.columns[column] = self._pictures.end(result.columns[column])
        result.counters = result.counters.plus(Counters(**dict.fromkeys(kind.counters, 0)))
        return result

    def _bad(self, result: Encoded, error: DataError) -> None:
        if self._data.on_bad_row == "fail":
            raise _Fatal(f"{error}. Correct the row, or set data.on_bad_row: skip.")
        result.counters.rows += 1
        result.counters.bad_rows += 1
        result.bad_rows.append(str(error))

    def _documents(self, result: Encoded, where: str, example: Document) -> list[Document]:
        """The documents that the example becomes."""
        length, limit = example.longest, self._data.sequence_length
        if length > limit and self._data.on_too_long == "fail":
            raise _Fatal(
                f"{where}: {length} tokens, but data.sequence_length is {limit}. Raise it, or set "
                f"data.on_too_long to {self._data.too_long_remedies}."
            )
        return documents_of(self._data, example, result.counters)


def _joined(column: Column, documents: Sequence[Document]) -> NDArray[Any]:
    """The column's values of the documents, end to end."""
    every = [np.zeros((0, *column.shape), column.dtype)]
    for document in documents:
        given = document.columns[column.name]
        values = np.asarray([given] if column.per == "document" else given, column.dtype)
        due = {
            "document": 1,
            "token": len(document.tokens),
            "target": int(document.targets.sum()),
            "picture": int(document.columns.get(COUNTED, 0)),
        }[column.per]
        assert values.shape == (due, *column.shape), (
            f"the column {column.name} has {values.shape} for {due} {column.per}s"
        )
        every.append(values)
    return np.concatenate(every)


def documents_of(data: Data, example: Document, counters: Counters) -> list[Document]:
    """The documents that a row becomes: cut to the sequence length or into pieces, without those that train nothing.

    Adds the outcome to `counters`."""
    limit = data.sequence_length
    if example.longest < data.min_length:
        counters.dropped += 1
        return []
    if example.longest > limit:
        match data.on_too_long:
            case "drop" | "fail":
                counters.dropped += 1
                return []
            case "truncate":
                counters.truncated += 1
                example = example.cut(limit)
            case "split":
                counters.split += 1
    teaching = [piece for piece in example.pieces(limit) if piece.teaches]
    if not teaching:
        counters.without_targets += 1
    for name, more in (count for piece in teaching for count in piece.counts.items()):
        setattr(counters, name, (getattr(counters, name) or 0) + more)
    return teaching


def nothing_to_train(what: str, counters: Counters) -> str:
    """The message that refuses data if none of its rows becomes a document. `what` names its setting or its files."""
    return (
        f"{what}: none of the {counters.rows:,} rows can be trained on: {counters.bad_rows:,} bad rows,"
        f" {counters.without_targets:,} without a token to train, {counters.dropped:,} dropped as too long or too"
        " short. Check data.format, data.fields, data.train_on and data.sequence_length."
    )


def untagged_note(words: int | None) -> tuple[str, ...]:
    """A sentence about words whose tags no token can carry, if there are any."""
    if not words:
        return ()
    return (
        f"{words:,} words are not trained, as a token that begins several words with different tags can carry none",
    )


def refusals(data: Data, what: str, counters: Counters, documents: Sequence[int]) -> list[str]:
    """Sentences that say why the rows, which were all read, cannot be trained on. Reports and compilations use them.

    `what` is the setting that names the rows, `documents` the number of documents of each source.
    """
    if not sum(documents):
        return [nothing_to_train(what, counters)]
    if what != "data.train":
        return []
    empty = [
        f"data.train[{index}]: has a fraction of {source.fraction}, but no document. Remove it."
        for index, source in enumerate(data.train)
        if source.fraction is not None and not documents[index]
    ]
    sided = None if counters.desired is None else one_kind(counters.desired, sum(documents))
    return [*empty, *([sided] if sided else [])]
