"""The length of an epoch before a run compiles anything.

It comes from data that an earlier start compiled, or is estimated from the sizes of the files.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import Config, Data, Source
from trainer.config.row_kinds import ROW_KINDS
from trainer.data.compile.fingerprint import fingerprint, hash_tokens
from trainer.data.compile.inputs import find_train
from trainer.data.dataset.manifest import read_manifest
from trainer.data.order.settings import bins_in, kept_bins, train_order
from trainer.data.source.files import SourceFile, expand, is_compressed, is_of_hub
from trainer.data.source.reading import batches
from trainer.errors import CapstanError
from trainer.store.store import Store

if TYPE_CHECKING:
    from trainer.data.dataset.pictures import DifferentPictures

# Bytes of a file that become one token. A token of English text has about four bytes. JSON's punctuation and the tokens
# that a template adds roughly cancel out.
BYTES_A_TOKEN = 4
_SAMPLED_SIZES = 4
# Bytes of text in one byte of a compressed file. Parquet is compressed too.
_COMPRESSED = 3


@dataclass(frozen=True)
class EpochPictures:
    """The pictures of compiled data, by a sample of its documents; or its videos, or its sounds.

    `share` of the tokens stand for them, and `tokens` is the mean of one. `sizes` has some of them, from small to
    large, each for equally many: height and width, or the two numbers that the index keeps of this `modality`.
    """

    share: float
    tokens: float
    sizes: tuple[tuple[int, int], ...]
    modality: int = 0


@dataclass(frozen=True)
class EpochLength:
    """An epoch of a run's training data: its tokens, and the packed rows that they make if that is known.

    `bins` has the exact rows of the first epochs if they were counted. Without `compiled` everything is estimated from
    `file_bytes`, the size of the files.
    """

    tokens: int
    rows: int | None
    bins: tuple[int, ...] = ()
    compiled: bool = False
    file_bytes: int = 0
    pictures: tuple[EpochPictures, ...] = ()


def epoch_length(config: Config, tokenizer: Path | None, store: Store | None) -> EpochLength | None:
    """The length of an epoch of the run. None if its files cannot be read, or if they would have to be downloaded.

    `tokenizer` is the directory of the tokenizer's files, or None if they are not on this machine. `store` is the run's
    store, or None if it does not answer. Data sets of the Hub are never downloaded for this.
    """
    if any(is_of_hub(source) for source in config.data.train):
        return None
    try:
        files, part, data = find_train(config)
    except CapstanError:  # files are missing, or have rows of no known format
        try:
            return _estimated(config, expand(config.data.train, "data.train"))
        except CapstanError:
            return None
    if store is None or tokenizer is None:
        return _estimated(config, files)
    try:
        return _compiled(config, store, fingerprint(data, files, hash_tokens(tokenizer, config.model), part))
    except CapstanError:  # it is not compiled, or the store fails
        return _estimated(config, files)


def compiled_pictures(config: Config, tokenizer: Path | None, store: Store | None) -> "DifferentPictures | None":
    """The pictures of the run's training data. None before it is compiled, and as `epoch_length`."""
    from trainer.data.dataset.dataset import open_dataset
    from trainer.data.dataset.pictures import different_pictures

    if store is None or tokenizer is None or any(is_of_hub(source) for source in config.data.train):
        return None
    try:
        files, part, data = find_train(config)
        key = fingerprint(data, files, hash_tokens(tokenizer, config.model), part)
        return different_pictures(open_dataset(store, key))
    except CapstanError:
        return None


def _taken(source: Source, size: int, files: Sequence[SourceFile]) -> int:
    """How many bytes of `size` the source's `take` keeps. A number of rows is converted by the length of the first."""
    if source.take is None or source.take < 1:
        return int(size * (source.take or 1))
    first = next(batches(replace(files[0], take=None)), None)
    of_row = first.read / max(1, first.content.count()) if first else 0
    return min(size, int(of_row * source.take * (_COMPRESSED if is_compressed(files[0].key) else 1)))


def _share_held_out(data: Data, files: Sequence[SourceFile]) -> float:
    """The share of the rows that `data.held_out` keeps apart. A number is converted by the length of the first rows."""
    if data.held_out < 1:
        return data.held_out
    first, size = next(batches(files[0]), None), sum(file.size for file in files)
    return min(1.0, first.read / max(1, first.content.count()) * data.held_out / size) if first and size else 0.0


def _compiled(config: Config, store: Store, key: str) -> EpochLength:
    manifest = read_manifest(store, key)
    order = train_order(config)
    weights = order.weights_for([source.tokens for source in manifest.sources])
    tokens = sum(weight * source.tokens for weight, source in zip(weights, manifest.sources, strict=True))
    documents = sum(weight * source.documents for weight, source in zip(weights, manifest.sources, strict=True))
    rows = (tokens + documents * order.beside) / order.capacity if order.packing else documents
    bins = tuple(map(bins_in, kept_bins(store, key, order)))
    pictures = tuple(_pictures(store, key, weights)) if ROW_KINDS[config.data.kind].sees else ()
    return EpochLength(round(tokens), ceil(rows), bins, compiled=True, pictures=pictures)


def _pictures(store: Store, key: str, weights: Sequence[float]) -> Iterator[EpochPictures]:
    """Yield the files of each modality that the sample has. An epoch visits each source as its weight says."""
    import numpy as np  # nothing that a plan over text should import

    from trainer.data.dataset.dataset import open_chapter
    from trainer.data.dataset.pictures import sampled_files

    values, each, every = sampled_files(open_chapter(store, key, 0), weights)
    for modality in np.unique(values["modality"]).tolist():
        chosen = values["modality"] == modality
        own, counts = values[chosen], each[chosen]
        order = np.argsort(own["tokens"].astype(np.int64) * 2**32 + own["width"], kind="stable")
        smaller = np.cumsum(counts[order])
        shares = (2 * np.arange(_SAMPLED_SIZES) + 1) / (2 * _SAMPLED_SIZES)
        places = np.searchsorted(smaller, shares * smaller[-1], side="right")
        sizes = tuple((int(one["height"]), int(one["width"])) for one in own[order[places]])
        tokens = float((counts * own["tokens"]).sum())
        yield EpochPictures(tokens / every, tokens / float(counts.sum()), sizes, modality)


def _estimated(config: Config, files: Sequence[SourceFile]) -> EpochLength:
    order, sizes = train_order(config), [0] * len(config.data.train)
    for file in files:
        sizes[file.source] += file.size * (_COMPRESSED if is_compressed(file.key) else 1)
    for index, source in enumerate(config.data.train):
        sizes[index] = _taken(source, sizes[index], [file for file in files if file.source == index])
    weighted = sum(weight * size for weight, size in zip(order.weights_for(sizes), sizes, strict=True))
    tokens = weighted * (1 - _share_held_out(config.data, files)) / BYTES_A_TOKEN
    rows = ceil(tokens / order.sequence_length) if order.packing else None
    return EpochLength(round(tokens), rows, file_bytes=sum(file.size for file in files))
