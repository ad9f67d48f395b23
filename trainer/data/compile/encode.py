"""Batches of rows into tokens: which rows become documents."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.base.tokenizer import Tokenizer
from trainer.config import Data
from trainer.data.dataset.binary import DESIRED_BIT, TARGET_BIT, TOKEN
from trainer.data.dataset.manifest import Counters, LeftOut, add_left_out
from trainer.data.format.formats import RowForm, as_read, explicit_form, or_error
from trainer.data.render import alternatives, labelled, pairs
from trainer.data.render.alternatives import Alternatives
from trainer.data.render.answers import AnswersRenderer
from trainer.data.render.chat import Example, Renderer, Turn
from trainer.data.render.labelled import Labelled, one_kind
from trainer.data.render.numbered import Classified, ClassifiedRenderer, Tagged, TaggedRenderer
from trainer.data.render.pairs import Pair
from trainer.data.source.held_out import Part
from trainer.data.source.rows import Batch, Row, at, printable
from trainer.errors import DataError

BAD_ROWS_SHOWN = 20


@dataclass
class Encoded:
    """The documents of a batch.

    `tokens` (tokens,) uint32 are those of its documents end to end, with `TARGET_BIT` set on trained ones, and
    `lengths` (documents,) how many each has. `error` is the first row that ends the compilation, if any does.
    """

    tokens: NDArray[np.uint32]
    lengths: NDArray[np.int64]
    counters: Counters = field(default_factory=Counters)
    bad_rows: list[str] = field(default_factory=list)
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    error: str | None = None

    @property
    def targets(self) -> int:
        return int(np.count_nonzero(self.tokens & TARGET_BIT))


def left_out_of(names: Iterable[str], where: str) -> dict[str, LeftOut]:
    """The things of these names that the row at `where` carries and its text lacks, ready to be added up."""
    return {printable(name): LeftOut(rows=1, examples=[where]) for name in names}


_RENDERERS = {
    "preference": partial(AnswersRenderer, read=pairs.read, documents=pairs.documents),
    "labelled": partial(AnswersRenderer, read=labelled.read, documents=labelled.documents),
    "answers": partial(AnswersRenderer, read=alternatives.read, documents=alternatives.documents),
    "classified": ClassifiedRenderer,
    "multilabel": ClassifiedRenderer,
    "tagged": TaggedRenderer,
}
_RowRenderer = Renderer | AnswersRenderer[Any] | ClassifiedRenderer | TaggedRenderer
Document = Alternatives | Example | Pair | Labelled | Classified | Tagged
"""A row, tokenized."""


class RowEncoder:
    """Encodes rows of any form with one tokenizer. Each form has a renderer of its own, made when its first rows come;
    it raises `ConfigError` where the tokenizer cannot serve the form."""

    def __init__(self, tokenizer: Tokenizer, data: Data) -> None:
        self._tokenizer, self._data = tokenizer, data
        self._renderers: dict[RowForm, _RowRenderer] = {}
        if data.format != "auto":
            self._renderer(explicit_form(data))

    def encode(self, form: RowForm, rows: Sequence[Row]) -> list[Document | DataError]:
        """Each row's document, or what is wrong with it; the error's text has no place in it."""
        read = [or_error(form.read, row) for row in rows]
        encoded = iter(self._renderer(form).encode([row for row in read if not isinstance(row, DataError)]))
        return [row if isinstance(row, DataError) else next(encoded) for row in read]

    def turns(self, form: RowForm, row: Row) -> list[Turn]:
        """The turns of a row. Raises `DataError` where it is not of this form."""
        return self._renderer(form).turns(form.read(row))

    def _renderer(self, form: RowForm) -> _RowRenderer:
        if form not in self._renderers:
            kind = _RENDERERS.get(form.kind, Renderer)
            self._renderers[form] = kind(self._tokenizer, as_read(self._data, form))
        return self._renderers[form]


class _Fatal(Exception):
    """A row ends the compilation."""


class Encoder:
    """Turns batches into documents as the settings say, and counts what did not become one. Raises `ConfigError` as
    `RowEncoder`.
    """

    def __init__(self, data: Data, tokenizer: Tokenizer, part: Part) -> None:
        self._data = data
        self._rows = RowEncoder(tokenizer, data)
        self._part = part

    def __call__(self, batch: Batch) -> Encoded:
        form = batch.form or explicit_form(self._data)
        result = Encoded(np.empty(0, TOKEN), np.empty(0, np.int64))
        documents: list[NDArray[np.uint32]] = []
        try:
            rows = self._part.rows(batch, lambda error: self._bad(result, error))
            examples = self._rows.encode(form, [row for _, row in rows])
            for (where, _), example in zip(rows, examples, strict=True):
                if isinstance(example, DataError):
                    self._bad(result, at(where, example))
                else:
                    result.counters.rows += 1
                    add_left_out(result.left_out, left_out_of(example.left_out, where))
                    documents += self._documents(result, where, example)
        except _Fatal as error:
            result.error = str(error)
        result.lengths = np.array([len(document) for document in documents], np.int64)
        result.tokens = np.concatenate([result.tokens, *documents])
        if form.kind == "labelled" and result.counters.desired is None:
            result.counters.desired = 0
        return result

    def _bad(self, result: Encoded, error: DataError) -> None:
        if self._data.on_bad_row == "fail":
            raise _Fatal(f"{error}. Correct the row, or set data.on_bad_row: skip.")
        result.counters.rows += 1
        result.counters.bad_rows += 1
        result.bad_rows.append(str(error))

    def _documents(self, result: Encoded, where: str, example: Document) -> list[NDArray[np.uint32]]:
        """The example as it is stored."""
        length, limit = row_tokens(example), self._data.sequence_length
        if length > limit and self._data.on_too_long == "fail":
            raise _Fatal(
                f"{where}: {length} tokens, but data.sequence_length is {limit}. Raise it, or set "
                f"data.on_too_long to {self._data.too_long_remedies}."
            )
        return documents_of(self._data, example, result.counters)


def row_tokens(example: Document) -> int:
    """The tokens of the shortest row that holds a document, or each of the documents that it falls into."""
    return example.longest if isinstance(example, Alternatives) else len(example.tokens)


def documents_of(data: Data, example: Document, counters: Counters) -> list[NDArray[np.uint32]]:
    """The documents that a row becomes, as they are stored: cut to the sequence length or into pieces, without those
    that train nothing. `counters` counts what became of it."""
    limit = data.sequence_length
    if row_tokens(example) < data.min_length:
        counters.dropped += 1
        return []
    if row_tokens(example) > limit:
        match data.on_too_long:
            case "drop" | "fail":
                counters.dropped += 1
                return []
            case "truncate":
                counters.truncated += 1
                example = example.cut(limit)
            case "split":
                counters.split += 1
    teaching = [piece.stored() for piece in example.pieces(limit) if piece.teaches]
    if not teaching:
        counters.without_targets += 1
    if isinstance(example, Tagged) and example.untagged:
        counters.untagged = (counters.untagged or 0) + example.untagged
    if isinstance(example, Labelled):
        counters.desired = (counters.desired or 0) + sum(bool(document[0] & DESIRED_BIT) for document in teaching)
    return teaching


def nothing_to_train(what: str, counters: Counters) -> str:
    """The refusal of data of which no row becomes a document; `what` is the setting that names it, or its files."""
    return (
        f"{what}: none of the {counters.rows:,} rows can be trained on: {counters.bad_rows:,} bad rows,"
        f" {counters.without_targets:,} without a token to train, {counters.dropped:,} dropped as too long or too"
        " short. Check data.format, data.fields, data.loss_on and data.sequence_length."
    )


def untagged_note(words: int | None) -> tuple[str, ...]:
    """A sentence on so many words whose tags no token can carry, where there are any."""
    if not words:
        return ()
    return (
        f"{words:,} words are not trained, as a token that begins several words with different tags can carry none",
    )


def refusals(data: Data, what: str, counters: Counters, documents: Sequence[int]) -> list[str]:
    """The reasons why rows that were all read cannot be trained on, in sentences: for a report on them and for their
    compilation.

    `what` is the setting that names them, `documents` how many there are of each source.
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
