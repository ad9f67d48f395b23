"""A report on the content of a run's sources, before anything is compiled or trained.

It names texts that are equal or nearly so. Near duplicates are found by MinHash (Broder 1997) over all 8-byte sequences
of the text, after case and white space are normalised. The share of the 60 minima in which two texts agree estimates
the Jaccard similarity of their sequences. Texts that agree in all six minima of one of ten bands are compared, which
finds about 95 % of the pairs with a similarity of 0.8.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.base.base import Tokenizer
from trainer.base.find.media import numbered
from trainer.config import Config, Data
from trainer.config.row_kinds import ROW_KINDS
from trainer.data.compile.encode import RowEncoder, documents_of, left_out_of, refusals
from trainer.data.compile.inputs import Input, work_of
from trainer.data.compile.pool import mapper_for
from trainer.data.dataset.dataset import BLOCK_DOCUMENTS
from trainer.data.dataset.manifest import Counters, LeftOut, add_left_out
from trainer.data.dataset.pictures import entries_in
from trainer.data.format.formats import explicit_form
from trainer.data.format.pictures import BadPicture
from trainer.data.format.row_format import PICTURES
from trainer.data.order.order import EpochPlan, splitmix64
from trainer.data.order.settings import Order, train_order
from trainer.data.render.document import Document, Turn
from trainer.data.source.files import SourceFile
from trainer.data.source.reading import Part, batches
from trainer.data.source.rows import BadRow, Batch, at
from trainer.errors import DataError

SIMILAR = 0.8
_BANDS, _ROWS = 10, 6
_HASHES = _BANDS * _ROWS
_SHINGLE = 8
_CHUNK = 2**14
# One multiply-and-shift hash function each (Dietzfelbinger et al. 1997): odd factors, any summands.
_FACTORS = splitmix64(np.arange(_HASHES, dtype=np.uint64)) | np.uint64(1)
_SUMMANDS = splitmix64(np.arange(_HASHES, 2 * _HASHES, dtype=np.uint64))


@dataclass(frozen=True)
class Fingerprint:
    """A text: `exact` is a digest of it, `minima` (60,) uint32 its MinHash signature. `files` has the hashes of its
    pictures, videos and sounds, which are the same in texts that are alike."""

    exact: bytes
    minima: NDArray[np.uint32]
    files: bytes = b""

    @classmethod
    def of(cls, text: str, files: bytes = b"") -> "Fingerprint":
        even = " ".join(text.lower().split()).encode("utf-8", "surrogatepass").ljust(_SHINGLE)
        shingles = np.lib.stride_tricks.sliding_window_view(np.frombuffer(even, np.uint8), _SHINGLE)
        minima = np.full(_HASHES, 2**32 - 1, np.uint32)
        for start in range(0, len(shingles), _CHUNK):
            words = np.ascontiguousarray(shingles[start : start + _CHUNK]).view("<u8")[:, 0].astype(np.uint64)
            hashes = (splitmix64(words)[None] * _FACTORS[:, None] + _SUMMANDS[:, None]) >> np.uint64(32)
            minima = np.minimum(minima, hashes.min(axis=1).astype(np.uint32))
        exact = hashlib.blake2b(text.encode("utf-8", "surrogatepass") + files, digest_size=16).digest()
        return cls(exact, minima, files)

    def bands(self) -> list[tuple[int, bytes]]:
        return [(band, row.tobytes() + self.files) for band, row in enumerate(self.minima.reshape(_BANDS, _ROWS))]


class SeenTexts:
    """The texts so far. Each takes about 1.5 kB of memory."""

    def __init__(self) -> None:
        self._exact: dict[bytes, str] = {}
        self._bands: dict[tuple[int, bytes], tuple[str, NDArray[np.uint32]]] = {}

    def find(self, text: Fingerprint) -> tuple[Literal["exact", "near"], str] | None:
        """Whether an earlier text equals this one or nearly so, and the place of that text; None if there is none."""
        if text.exact in self._exact:
            return "exact", self._exact[text.exact]
        for band in text.bands():
            where, minima = self._bands.get(band, ("", None))
            if minima is not None and np.count_nonzero(minima == text.minima) >= SIMILAR * _HASHES:
                return "near", where
        return None

    def add(self, text: Fingerprint, where: str) -> None:
        """Remember a text. The first of several texts that share a band stands for all of them."""
        self._exact.setdefault(text.exact, where)
        for band in text.bands():
            self._bands.setdefault(band, (where, text.minima))


_EXAMPLES = 5
_SHORTEST = 256  # the shortest length for which losses are counted
_REPLACEMENT = "\ufffd"
_COUNTED_BY_NAME = ("left_out", "unused_fields", "bad_row_reasons")


@dataclass
class Findings:
    """The findings in the rows of one split. A count is a number of rows unless it says otherwise.

    Attributes:
        bad_rows: rows that cannot be used. `bad_row_reasons` counts the reasons, and `bad_row_examples` has one line
            for each reason.
        undecodable: rows that are not UTF-8, or contain U+FFFD, which replaces bytes that could not be decoded.
        too_long: rows longer than data.sequence_length. `tokens_cut` counts the tokens above it, and `dropped` the rows
            that are left out because of it.
        without_targets: rows that are left out because nothing in them is trained.
        desired: desired answers among the labelled rows that are not left out; None if rows have no labels.
        untagged: words whose tag no token can carry, because the token also begins a word with another tag.
        one_sided: rows without a user's turn or without an assistant's turn.
        empty_turns: rows with an empty turn.
        odd_roles: rows in which one role speaks twice in succession (except tools), or a system message comes later
            than the first turn.
        left_out: what rows carry but their text does not contain, such as calls that the chat template ignores.
        unused_fields: fields of rows that `data.format` does not use.
        exact_duplicates, near_duplicates: rows like an earlier row of this split. `duplicate_examples` has pairs
            (row, earlier row).
        bad_pictures: bad rows with a picture that is missing or damaged, or in which nothing can be seen.
        pictures: what was found in the pictures of the rows; None if no row has one.
        files: the same of files of other modalities, such as "videos".
        in_train: evaluation rows that are also trained on, exactly or nearly.
        fill: the share of tokens in packed rows that are not padding, at this sequence length.
        lost: what would be lost at other sequence lengths: powers of two below the longest document.
    """

    rows: int = 0
    bad_rows: int = 0
    undecodable: int = 0
    documents: int = 0
    tokens: int = 0
    targets: int = 0
    too_long: int = 0
    tokens_cut: int = 0
    dropped: int = 0
    without_targets: int = 0
    desired: int | None = None
    untagged: int = 0
    one_sided: int = 0
    empty_turns: int = 0
    odd_roles: int = 0
    exact_duplicates: int = 0
    near_duplicates: int = 0
    in_train: dict[str, int] | None = None
    bad_pictures: int = 0
    pictures: "PictureFindings | None" = None
    files: "dict[str, PictureFindings]" = field(default_factory=dict)
    packed_rows: int = 0
    fill: float = 0.0
    lengths: dict[str, int] = field(default_factory=dict)
    histogram: dict[int, int] = field(default_factory=dict)
    lost: dict[int, "LostAt"] = field(default_factory=dict)
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    unused_fields: dict[str, LeftOut] = field(default_factory=dict)
    bad_row_reasons: dict[str, LeftOut] = field(default_factory=dict)
    bad_row_examples: list[str] = field(default_factory=list)
    duplicate_examples: list[tuple[str, str]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        named = {
            name: {what: found.model_dump() for what, found in getattr(self, name).items()} for name in _COUNTED_BY_NAME
        }
        return {**asdict(self), **named, "lost": {length: lost._asdict() for length, lost in self.lost.items()}}


@dataclass
class PictureFindings:
    """The pictures of a split.

    Attributes:
        count: places for pictures in all rows.
        different: how many of them are different pictures, by their SHA-256.
        also_trained: different pictures of evaluation rows that training rows have, too.
        tokens: those that stand for pictures.
        sizes: how many have each size, the most common ones, as "width x height", or in the words of their modality.
        pixels: the smallest, median and largest number of pixels of pictures.
    """

    count: int = 0
    different: int = 0
    also_trained: int | None = None
    tokens: int = 0
    sizes: dict[str, int] = field(default_factory=dict)
    pixels: dict[str, int] = field(default_factory=dict)


class LostAt(NamedTuple):
    """The share of documents that are longer than a sequence length, and the shares of all targets that are lost.

    One share is lost if such documents are cut, the other if they are dropped."""

    documents: float
    targets_cut: float
    targets_dropped: float


@dataclass(frozen=True)
class DataReport:
    """The findings by split, and the reasons for which `capstan train` would refuse the data."""

    splits: dict[str, Findings]
    refusals: list[str]

    def to_json(self) -> dict[str, Any]:
        return {**{what: found.to_json() for what, found in self.splits.items()}, "refusals": self.refusals}


def check_data(
    config: Config,
    tokenizer: Tokenizer,
    inputs: dict[str, Input],
    progress: Callable[[str, int, int], None],
) -> DataReport:
    """Read and tokenize every row of `inputs` (see `inputs.find`). `progress` gets the split, bytes read and all bytes.

    Raises:
        ConfigError: the tokenizer cannot serve `data.format`.
        DataError: a file as a whole is damaged.
    """
    trained, pictures = SeenTexts(), _Pictures(None)
    splits: dict[str, Findings] = {}
    refused: list[str] = []
    for what, (files, part, data) in inputs.items():
        size = sum(file.size for file in files)
        start = partial(_Inspector, data, tokenizer, part.over(files))
        of_split = pictures if what == "train" else _Pictures(pictures)
        collected = _Collected(trained if what == "train" else SeenTexts(), trained, of_split)
        documents = [0] * (files[-1].source + 1)
        for inspected, (source, read) in mapper_for(work_of(inputs[what]))(_read(files), start):
            collected.take(inspected)
            documents[source] += len(inspected.kept)
            progress(what, read, size)
        splits[what] = collected.finish(replace(train_order(config), weights=(1.0,), fractions=(), seed=0))
        refused += _refusals(data, what, splits[what], documents)
    return DataReport(splits, refused)


def _read(files: list[SourceFile]) -> Iterator[tuple[Batch, tuple[int, int]]]:
    """Yield every batch with its source and the bytes of all files that were read by its end."""
    before = 0
    for file in files:
        for batch in batches(file):
            yield batch, (file.source, before + batch.read)
        before += file.size


@dataclass
class _Inspected:
    """The findings in one batch.

    It also has the number of tokens of each row and of each document that a run makes of it, and the place and text of
    each row."""

    found: Findings = field(default_factory=Findings)
    counters: Counters = field(default_factory=Counters)
    lengths: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    lost: Counter[tuple[int, str]] = field(default_factory=Counter)  # by the length, and a field of `LostAt`
    texts: list[tuple[str, Fingerprint]] = field(default_factory=list)
    pictures: list[NDArray[np.uint8]] = field(default_factory=list)


class _Inspector:
    """Inspects batches one by one, in any process."""

    def __init__(self, data: Data, tokenizer: Tokenizer, part: Part) -> None:
        self._data = data
        self._rows = RowEncoder(tokenizer, data)
        self._part = part

    def __call__(self, batch: Batch) -> _Inspected:
        result = _Inspected()
        found, limit = result.found, self._data.sequence_length

        def bad(error: BadRow) -> None:
            found.rows += 1
            found.undecodable += "not UTF-8" in str(error)
            _bad(found, error)

        form = batch.form or explicit_form(self._data)
        rows = self._part.rows(batch, bad)
        examples = self._rows.encode(form, [row for _, row in rows], batch.uri)
        for (where, row), example in zip(rows, examples, strict=True):
            found.rows += 1
            if isinstance(example, DataError):
                found.bad_pictures += isinstance(example, BadPicture)
                _bad(found, at(where, example))
                continue
            files = b""
            if len(values := example.columns.get(PICTURES, ())):
                result.pictures.append(values)
                files = entries_in(values)["sha256"].tobytes()
            add_left_out(found.left_out, left_out_of(example.left_out, where))
            add_left_out(found.unused_fields, left_out_of(form.unused(row), where))
            turns = self._rows.turns(form, row)
            _converse(found, turns, form.kind)
            # Leave out the system message: many rows share it, so it does not make them duplicates.
            spoken = "\n".join(turn.content for turn in turns if turn.role not in ("system", "developer"))
            result.texts.append((where, Fingerprint.of(spoken, files)))
            length = example.longest
            result.lengths.append(length)
            found.documents += 1
            found.tokens += len(example.tokens)
            found.targets += int(example.targets.sum())
            found.too_long += length > limit
            found.tokens_cut += max(0, length - limit)
            result.lost.update(_lost(example))
            stored = documents_of(self._data, example, result.counters)
            result.kept += [len(document.tokens) for document in stored]
        found.dropped, found.without_targets = result.counters.dropped, result.counters.without_targets
        found.untagged = result.counters.untagged or 0
        if "desired" in ROW_KINDS[form.kind].counters:
            found.desired = result.counters.desired or 0
        return result


def _lost(example: Document) -> dict[tuple[int, str], int]:
    """For each shorter length, counts of the document and of its targets that would be lost."""
    lost, targets, length = dict[tuple[int, str], int](), int(example.targets.sum()), _SHORTEST
    while length < example.longest:
        left = int(example.cut(length).targets.sum())
        counts = LostAt(1, targets - left, targets)
        lost |= {(length, name): int(count) for name, count in counts._asdict().items()}
        length *= 2
    return lost


def _converse(found: Findings, turns: list[Turn], kind: str) -> None:
    roles = [turn.role for turn in turns]
    if kind == "chat":
        found.one_sided += not {"user", "assistant"} <= set(roles)
        found.odd_roles += any(a == b != "tool" for a, b in pairwise(roles)) or "system" in roles[1:]
    found.empty_turns += any(not turn.content.strip() and not turn.calls for turn in turns)
    found.undecodable += any(_REPLACEMENT in turn.content for turn in turns)


def _bad(found: Findings, error: BadRow) -> None:
    found.bad_rows += 1
    add_left_out(found.bad_row_reasons, {error.reason: LeftOut(rows=1, examples=[error.where])})


def _line(reason: str, found: LeftOut) -> str:
    rest = found.rows - len(found.examples)
    return f"{', '.join(found.examples)}{f' and {rest:,} more rows' if rest else ''}: {reason}"


class _Collected:
    """Collects the batches of a split in their order. `seen` has its texts so far, `trained` those trained on."""

    def __init__(self, seen: SeenTexts, trained: SeenTexts, pictures: "_Pictures") -> None:
        self._seen, self._trained, self._pictures = seen, trained, pictures
        self._all = _Inspected(Findings(in_train=None if seen is trained else {"exact": 0, "near": 0}))

    def take(self, batch: _Inspected) -> None:
        found = self._all.found
        for name, value in vars(batch.found).items():
            if isinstance(value, int):
                setattr(found, name, (getattr(found, name) or 0) + value)
            elif name in _COUNTED_BY_NAME:
                add_left_out(getattr(found, name), value)
        self._all.lengths += batch.lengths
        self._all.kept += batch.kept
        self._all.lost.update(batch.lost)
        for where, text in batch.texts:
            self._compare(where, text)
        for values in batch.pictures:
            self._pictures.take(values)

    def _compare(self, where: str, text: Fingerprint) -> None:
        found = self._all.found
        if found.in_train is not None and (match := self._trained.find(text)):
            found.in_train[match[0]] += 1
            found.duplicate_examples.append((where, match[1]))
        if match := self._seen.find(text):
            found.exact_duplicates += match[0] == "exact"
            found.near_duplicates += match[0] == "near"
            found.duplicate_examples.append((where, match[1]))
        else:
            self._seen.add(text, where)
        del found.duplicate_examples[_EXAMPLES:]

    def finish(self, order: Order) -> Findings:
        found, lengths = self._all.found, np.array(self._all.lengths, np.int64)
        found.bad_row_examples = [_line(reason, same) for reason, same in found.bad_row_reasons.items()]
        if len(lengths):
            quantiles = {"min": 0, "median": 0.5, "p90": 0.9, "p99": 0.99, "max": 1}
            found.lengths = {name: int(np.quantile(lengths, q)) for name, q in quantiles.items()}
            above = 2 ** np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
            bounds, counts = np.unique(above, return_counts=True)
            found.histogram = dict(zip(bounds.tolist(), counts.tolist(), strict=True))
        of = LostAt(max(1, found.documents), max(1, found.targets), max(1, found.targets))._asdict()
        found.lost = {
            length: LostAt(**{name: round(self._all.lost[length, name] / whole, 6) for name, whole in of.items()})
            for length in sorted({length for length, _ in self._all.lost})
        }
        found.files = self._pictures.found()
        found.pictures = found.files.pop("pictures", None)
        found.packed_rows, found.fill = _pack(np.array(self._all.kept, np.int64), order)
        return found


class _Pictures:
    """Counts the pictures of a split, and files of other modalities. `trained` counts those of the training data, or is
    None for these themselves."""

    def __init__(self, trained: "_Pictures | None") -> None:
        self._trained = trained
        self._of = defaultdict[int, _Counted](_Counted)

    def take(self, values: NDArray[np.uint8]) -> None:
        for one in entries_in(values):
            of = self._of[int(one["modality"])]
            of.digests.add(one["sha256"].tobytes())
            of.shapes[int(one["height"]), int(one["width"])] += 1
            of.tokens += int(one["tokens"])

    def found(self) -> dict[str, PictureFindings]:
        """Return what was found, by the noun of the modality: "pictures"."""
        return {f"{numbered(number).noun}s": self._found(number, of) for number, of in sorted(self._of.items())}

    def _found(self, number: int, of: "_Counted") -> PictureFindings:
        modality = numbered(number)
        also = None if self._trained is None else len(of.digests & self._trained._of[number].digests)
        common = of.shapes.most_common(_EXAMPLES)
        sizes = {modality.title(modality.kept(*shape)).partition(" of ")[2]: count for shape, count in common}
        pixels = dict[str, int]()
        if modality.number == 0:
            each = np.repeat(*np.array([(height * width, count) for (height, width), count in of.shapes.items()]).T)
            pixels = {name: int(np.quantile(each, q)) for name, q in {"min": 0, "median": 0.5, "max": 1}.items()}
            sizes = {size.removesuffix(" pixels"): count for size, count in sizes.items()}
        return PictureFindings(of.shapes.total(), len(of.digests), also, of.tokens, sizes, pixels)


@dataclass
class _Counted:
    """The files of one modality: their hashes, how many have each shape as the index has it, and their tokens."""

    digests: set[bytes] = field(default_factory=set[bytes])
    shapes: Counter[tuple[int, int]] = field(default_factory=Counter[tuple[int, int]])
    tokens: int = 0


def _pack(lengths: np.ndarray, order: Order) -> tuple[int, float]:
    """The number of packed rows that the documents make, and the share of their tokens that is not padding."""
    if not len(lengths):
        return 0, 0.0
    blocks = np.array([*range(0, len(lengths), BLOCK_DOCUMENTS), len(lengths)])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    bins = sum(EpochPlan(offsets, blocks, np.zeros(len(blocks) - 1, np.int32), order, epoch=0).count_bins())
    return bins, round(int((lengths + order.beside).sum()) / (bins * order.capacity), 4)


def _refusals(data: Data, what: str, found: Findings, documents: Sequence[int]) -> list[str]:
    setting, refused = what if what.startswith("eval.sets.") else f"data.{what}", list[str]()
    if found.bad_rows and data.on_bad_row == "fail":
        refused.append(
            f"{setting}: {found.bad_rows} bad rows, the first is {found.bad_row_examples[0]}. Correct them, or set "
            "data.on_bad_row: skip."
        )
    if found.too_long and data.on_too_long == "fail":
        refused.append(
            f"{setting}: {found.too_long} rows are longer than data.sequence_length: {data.sequence_length}. Raise it,"
            f" or set data.on_too_long to {data.too_long_remedies}."
        )
    counters = Counters(
        rows=found.rows,
        bad_rows=found.bad_rows,
        dropped=found.dropped,
        without_targets=found.without_targets,
        desired=found.desired,
    )
    return refused + refusals(data, setting, counters, documents)
