"""Shows a few rows of a run's data as the model sees them: which pieces are trained, and what of a row was left out.

Rows are encoded one by one, as a compilation encodes them. Nothing is written, and no other rows are read. Packed rows
hold only the first documents, while a run packs the documents of a whole window (`order`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.base.base import Tokenizer
from trainer.base.find.media import numbered
from trainer.config import Config
from trainer.config.row_kinds import ROW_KINDS
from trainer.data.compile.encode import BatchEncoder, Encoded, RowEncoder, untagged_note
from trainer.data.compile.inputs import Input
from trainer.data.dataset.dataset import (
    DESIRED_BIT,
    ID_BITS,
    MISMATCHED_BIT,
    REJECTED_BIT,
    SEGMENT_BITS,
    TARGET_BIT,
    Dataset,
)
from trainer.data.dataset.pictures import entries_in
from trainer.data.format.formats import Row, RowForm
from trainer.data.format.row_format import COUNTED, PICTURES
from trainer.data.format.spans import shared_beginning
from trainer.data.format.unrendered import left_out_in_words
from trainer.data.order.order import best_fit_decreasing
from trainer.data.order.settings import train_order
from trainer.data.source.reading import EVERYTHING, batches
from trainer.data.source.rows import Batch, Decoded, printable
from trainer.errors import DataError

_PACKED_ROWS = 4  # so many packed rows are filled, or fewer if `_MOST_ROWS` rows do not fill them
_MOST_ROWS = 1024


@dataclass(frozen=True)
class ShownPicture:
    """A picture of a row: its SHA-256 in hex, its size in pixels after it was turned (0 x 0 for a file without one),
    its tokens, the `kind` of its modality, and what it is ("picture of 3 x 4 pixels")."""

    sha256: str
    width: int
    height: int
    tokens: int
    kind: str
    said: str

    @property
    def title(self) -> str:
        return f"{self.said}, {self.tokens} tokens"


@dataclass(frozen=True)
class TextPiece:
    """Consecutive tokens that are all trained or all untrained. A special token is a piece of its own, and so are the
    tokens of a picture, whose text is that of its title."""

    text: str
    trained: bool
    special: bool
    picture: ShownPicture | None = None


@dataclass(frozen=True)
class SeenDocument:
    """A document, or one of its answers: its place, its role in the row, its tokens, and which of them are trained."""

    where: str
    part: str
    tokens: list[int]
    trained: list[bool]
    pieces: list[TextPiece]


@dataclass(frozen=True)
class SeenRow:
    """A row of a source with its documents, or a packed row with the documents of several rows and its `padding`."""

    where: str
    form: str
    documents: list[SeenDocument]
    warnings: list[str]
    padding: int | None = None


class _Stored(NamedTuple):
    """The stored tokens of a document, and its pictures, of which each begins at a place in it. A document that is
    `labelled` has a desired or an undesired answer."""

    tokens: NDArray[np.uint32]
    pictures: Mapping[int, ShownPicture] = {}
    labelled: bool = False


class _Read(NamedTuple):
    where: str
    row: Row
    form: RowForm


class Decoding:
    """Turns the stored tokens of documents into text. `labels` are the classes or tags of the data, if it has any."""

    def __init__(self, tokenizer: Tokenizer, labels: Sequence[str] | None) -> None:
        self._tokenizer, self._labels = tokenizer, labels
        self._special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}

    def answers(self, where: str, document: _Stored) -> Iterator[SeenDocument]:
        """Yield the document, or each of its answers. If answers share a prompt, only the first comes with it."""
        stored = document.tokens
        second = np.flatnonzero(stored & SEGMENT_BITS)
        parts = [f"answer {number}" for number in range(1, len(second) + 2)] if len(second) else [""]
        if (stored & REJECTED_BIT).any():
            parts = ["chosen", "rejected"]
        elif document.labelled:
            parts = ["desired" if stored[0] & DESIRED_BIT else "undesired", "mismatched"]
        if labels := self._labels:
            yield self._named(where, stored, labels)
            return
        begins = [0, *second.tolist()]
        for part, answer, first in zip(parts, np.split(stored, second), begins, strict=False):
            tokens, trained = (answer & ID_BITS).tolist(), (answer & TARGET_BIT).astype(bool).tolist()
            pictures = {begin - first: picture for begin, picture in document.pictures.items() if begin >= first}
            yield SeenDocument(where, part, tokens, trained, list(self._pieces(tokens, trained, pictures)))

    def _named(self, where: str, stored: NDArray[np.uint32], labels: Sequence[str]) -> SeenDocument:
        """A text, and behind it the name of its class or of the tag of each word."""
        numbers, trained = stored & ID_BITS, (stored & TARGET_BIT).astype(bool)
        second = np.flatnonzero(stored & MISMATCHED_BIT)
        end = int(second[0]) if len(second) else int(np.flatnonzero(trained)[0])
        text, said = numbers[:end].tolist(), numbers[trained].tolist()
        several = not len(second) and len(said) == len(labels)
        chosen = np.flatnonzero(said).tolist() if several else said
        names = [labels[number] for number in chosen]
        pieces = [*self._pieces(text, [False] * end), TextPiece(f" {' '.join(names)}", True, True)]
        return SeenDocument(where, "", numbers.tolist(), trained.tolist(), pieces)

    def _pieces(
        self, tokens: list[int], trained: list[bool], pictures: Mapping[int, ShownPicture] | None = None
    ) -> Iterator[TextPiece]:
        """Yield the text piece by piece. `pictures` begin at places in it.

        A piece is the end of the text that all tokens up to its end decode to. Decoding a token alone may lose the
        white space before it."""

        pictures = pictures or {}
        begins = {place: begin for begin, one in pictures.items() for place in range(begin, begin + one.tokens)}

        def kind(place: int) -> tuple[bool, int | None]:
            return trained[place], begins.get(place, place if tokens[place] in self._special else None)

        before = ""
        for (is_trained, special), places in groupby(range(len(tokens)), kind):
            first, *more = places
            end = first + len(more) + 1
            text: Any = self._tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False)
            if (picture := pictures.get(first)) is not None:
                yield TextPiece(f"[{picture.title}]", is_trained, True, picture)
            else:
                # A piece may end within a character, which is decoded differently once it is complete.
                yield TextPiece(text[shared_beginning(before, text) :], is_trained, special is not None)
            before = text


class Viewer:
    """Shows rows of one split of a run's data. Raises `ConfigError` as `RowEncoder`."""

    def __init__(self, config: Config, tokenizer: Tokenizer, given: Input) -> None:
        self._config, self._given = config, given
        self._encoder = BatchEncoder(given.data, tokenizer, EVERYTHING)
        self._uncut = RowEncoder(tokenizer, given.data)
        self.held_out = list[str]()  # the places of rows that were passed over, as `data.held_out` keeps them apart
        self.pictures = dict[str, bytes]()  # the bytes of the pictures of all rows that were read, by SHA-256
        self._answers = Decoding(tokenizer, given.data.labels).answers

    def rows(self, first: int, count: int) -> list[SeenRow]:
        """`count` of the readable rows, from number `first` on, counted from 1.

        Raises `DataError` if there are fewer rows.
        """
        shown = [self._seen(row) for row in islice(self._read(), first - 1, first - 1 + count)]
        if not shown:
            raise DataError(f"--row: there is no row {first} in this data, or none before it can be read.")
        return shown

    def packed(self, number: int) -> SeenRow:
        """The packed row of this number, counted from 1, among those that the first documents fill.

        Raises `DataError` if there are fewer packed rows.
        """
        order, places, stored = train_order(self._config), list[str](), list[_Stored]()
        for row in islice(self._read(), _MOST_ROWS):
            documents = _split(self._encoded(row), row.form)
            places += [row.where] * len(documents)
            stored += documents
            if sum(len(document.tokens) for document in stored) >= _PACKED_ROWS * order.sequence_length:
                break
        sizes = np.array([len(document.tokens) + order.beside for document in stored], np.int64)
        longest_first, bins = np.argsort(-sizes, kind="stable"), np.arange(len(stored))
        if order.packing:
            bins[longest_first] = best_fit_decreasing(sizes[longest_first], order.capacity)
        chosen = np.flatnonzero(bins == number - 1).tolist()
        if not chosen:
            raise DataError(
                f"--row: the first {len(stored)} documents fill {len(set(bins))} packed rows, and {number} is none."
            )
        return SeenRow(
            where=f"packed row {number}",
            form="",
            documents=[answer for index in chosen for answer in self._answers(places[index], stored[index])],
            warnings=[f"packed of the first {len(stored):,} documents; a run packs those of a whole window"],
            padding=order.capacity - int(sizes[chosen].sum()),
        )

    def _read(self) -> Iterator[_Read]:
        def skip(error: DataError) -> None:
            """Ignore a bad row. `capstan data check` counts them."""

        part = self._given.part.over(self._given.files)
        for file in self._given.files:
            for batch in batches(file):
                form = batch.form
                assert form is not None
                used = dict(part.rows(batch, skip))
                for where, row in batch.rows(skip):
                    if where in used:
                        yield _Read(where, row, form)
                    elif part.amount and not part.held_out:
                        self.held_out.append(where)

    def _encoded(self, read: _Read) -> Encoded:
        uri, _, number = read.where.rpartition(":")
        self.pictures |= {sha256(one).hexdigest(): one for one in self._uncut.pictures(read.form, read.row, uri)}
        return self._encoder(Batch(uri, int(number), Decoded([read.row]), 0, read.form))

    def _seen(self, read: _Read) -> SeenRow:
        encoded = self._encoded(read)
        stored, warnings = _split(encoded, read.form), _warnings(encoded, read)
        (whole,) = self._uncut.encode(read.form, [read.row], read.where.rpartition(":")[0])
        if not stored and not isinstance(whole, DataError):
            stored = [_Stored(whole.stored(), _pictures(whole.columns.get(PICTURES)), _is_labelled(read.form))]
        documents = [answer for document in stored for answer in self._answers(read.where, document)]
        return SeenRow(read.where, str(read.form), documents, warnings)


def documents_with_pictures(dataset: Dataset, decoding: Decoding, count: int) -> Iterator[tuple[SeenDocument, Any]]:
    """Yield the first documents of a compiled data set that have pictures, each with its entries of `PICTURE`.

    Answers of one document count apart. Only the first block is read. Raises `StorageError` if it cannot be read.
    """
    read, found = dataset.read(np.array([0])), 0
    labelled = dataset.manifest.counters.desired is not None
    for number in range(int(dataset.blocks[1])):
        at = np.array([number])
        (values,) = read.gather_column(PICTURES, at)
        if not len(values):
            continue
        stored = _Stored(read.gather(at), _pictures(values), labelled)
        for document in decoding.answers(f"document {number + 1}", stored):
            if (found := found + 1) > count:
                return
            yield document, entries_in(values)


def _is_labelled(form: RowForm) -> bool:
    return "desired" in ROW_KINDS[form.kind].counters


def _split(encoded: Encoded, form: RowForm) -> list[_Stored]:
    """The stored tokens of each document of a row of this form, and its pictures."""
    if not len(encoded.lengths):
        return []
    tokens = np.split(encoded.tokens, np.cumsum(encoded.lengths)[:-1])
    columns = {column.name: values for column, values in encoded.columns.items()}
    if PICTURES not in columns:
        return [_Stored(one, labelled=_is_labelled(form)) for one in tokens]
    each = np.split(columns[PICTURES], np.cumsum(columns[COUNTED])[:-1])
    return [_Stored(one, _pictures(values), _is_labelled(form)) for one, values in zip(tokens, each, strict=True)]


def _pictures(values: NDArray[Any] | None) -> Mapping[int, ShownPicture]:
    """The pictures of a document in its column for them, by the places where their tokens begin."""
    if values is None or not len(values):
        return {}

    def shown(one: np.void) -> ShownPicture:
        modality = numbered(int(one["modality"]))
        kept = modality.kept(int(one["height"]), int(one["width"]))
        size = getattr(kept, "width", 0), getattr(kept, "height", 0)
        digest, tokens = one["sha256"].tobytes().hex(), int(one["tokens"])
        return ShownPicture(digest, *size, tokens, modality.kind, modality.title(kept))

    entries = entries_in(values)
    return {int(one["begin"]): shown(one) for one in entries}


def _warnings(encoded: Encoded, read: _Read) -> list[str]:
    counted = encoded.counters
    said = [
        (encoded.error, f"the run would end here: {encoded.error}"),
        (encoded.bad_rows, f"a bad row, which is skipped: {'; '.join(encoded.bad_rows)}"),
        (encoded.left_out, f"not in the text: {', '.join(map(left_out_in_words, encoded.left_out))}"),
        (unused := read.form.unused(read.row), f"fields without a use: {', '.join(map(printable, unused))}"),
        (counted.truncated, "cut to data.sequence_length"),
        (counted.split, f"split into {len(encoded.lengths)} documents of data.sequence_length"),
        (counted.dropped, "dropped, as it is longer than data.sequence_length"),
        (counted.untagged, "".join(untagged_note(counted.untagged))),
        (counted.without_targets, "left out, as nothing of it is trained"),
    ]
    return [sentence for there, sentence in said if there]
