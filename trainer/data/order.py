"""The order of an epoch: which documents share a bin, and in which order bins are used.

An epoch's plan is a pure function of (lengths and blocks of the data set, weights, sequence length, packing, seed,
epoch). It knows no ranks, so any number of them takes the same bins in the same global order, and it has no state, so
resuming is arithmetic.

    blocks of up to 256 documents -> seeded permutation -> windows of 64 blocks -> bins, packed in a window
    -> seeded permutation of the bins in a window

Documents are read in blocks, so that reading is a few long ranges; a window is what a rank holds in memory.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from trainer.data.pack import best_fit_decreasing

WINDOW_BLOCKS = 64

_BLOCKS, _TIES, _BINS, _PHASE = 1, 2, 3, 4


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014), element by element.

    Our own, because the order must not move with a library: NumPy does not promise the stream of a Generator.
    """
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def hash_key(*parts: int) -> np.uint64:
    """One 64-bit hash of a few non-negative integers."""
    key = np.zeros(1, np.uint64)
    for part in parts:
        key = splitmix64(key ^ np.uint64(part))
    return key[0]


def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """The permutation of range(count) that `key` stands for."""
    return np.argsort(splitmix64(np.arange(count, dtype=np.uint64) ^ hash_key(*key)), kind="stable")


@dataclass(frozen=True)
class Window:
    """`blocks` are the blocks to read, (at most 64,) int64; `bins` hold document ids, each (documents,) int64."""

    blocks: NDArray[np.int64]
    bins: list[NDArray[np.int64]]


class EpochPlan:
    """The bins of one epoch.

    Args:
        lengths: (documents,) int32, tokens of each document, none above `sequence_length`.
        blocks: (blocks + 1,) int64, the first document of each block, and the number of documents.
        block_sources: (blocks,) int32, the source that a block's documents come from.
        weights: visits an epoch of each source's documents. A fraction takes turns: at 0.5 a document is visited in
            every second epoch, and half of the documents in each.
        sequence_length: tokens of a bin.
        packing: False gives every document a bin of its own.

    At weight 1 every document is in exactly one bin of every epoch.
    """

    def __init__(
        self,
        lengths: NDArray[np.int32],
        blocks: NDArray[np.int64],
        block_sources: NDArray[np.int32],
        weights: tuple[float, ...],
        sequence_length: int,
        seed: int,
        epoch: int,
        packing: bool,
    ) -> None:
        assert lengths.size == 0 or lengths.max() <= sequence_length
        self._lengths = lengths
        self._blocks = blocks
        self._sequence_length = sequence_length
        self._seed = seed
        self._epoch = epoch
        self._packing = packing
        self._block_weights = np.asarray(weights, np.float64)[block_sources]
        # Each visit is a block with all its documents, or with those whose turn the fraction of the weight is.
        whole = np.floor(self._block_weights).astype(np.int64)
        partial = np.flatnonzero(self._block_weights > whole)
        visits = np.concatenate([np.repeat(np.arange(len(whole)), whole), partial])
        is_partial = np.arange(len(visits)) >= whole.sum()
        order = permutation(len(visits), seed, epoch, _BLOCKS)
        self._visits, self._is_partial = visits[order], is_partial[order]
        self.window = lru_cache(maxsize=2)(self._window)

    @property
    def num_windows(self) -> int:
        return -(-len(self._visits) // WINDOW_BLOCKS)

    @cached_property
    def bins_before(self) -> NDArray[np.int64]:
        """(windows + 1,) int64: bins in the windows before each, and in all. Packs the whole epoch, once."""
        counts = [len(self._window(index).bins) for index in range(self.num_windows)]
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @property
    def num_bins(self) -> int:
        return int(self.bins_before[-1])

    def locate(self, k: int) -> tuple[int, int]:
        """The window of bin k, and its place there."""
        assert 0 <= k < self.num_bins
        index = int(np.searchsorted(self.bins_before, k, side="right")) - 1
        return index, k - int(self.bins_before[index])

    def bin(self, k: int) -> NDArray[np.int64]:
        """Documents of bin k, in the order they are laid into the row, (documents,) int64."""
        index, place = self.locate(k)
        return self.window(index).bins[place]

    def _window(self, index: int) -> Window:
        part = slice(index * WINDOW_BLOCKS, (index + 1) * WINDOW_BLOCKS)
        visits, is_partial = self._visits[part], self._is_partial[part]
        documents = np.concatenate([self._documents(int(b), bool(p)) for b, p in zip(visits, is_partial, strict=True)])
        documents = documents[permutation(len(documents), self._seed, self._epoch, _TIES, index)]
        if self._packing:
            packed = best_fit_decreasing(self._lengths[documents].tolist(), self._sequence_length)
            bins = [documents[members] for members in packed]
        else:
            bins = np.split(documents, range(1, len(documents))) if len(documents) else []
        order = permutation(len(bins), self._seed, self._epoch, _BINS, index)
        return Window(np.unique(visits), [bins[place] for place in order])

    def _documents(self, block: int, is_partial: bool) -> NDArray[np.int64]:
        documents = np.arange(self._blocks[block], self._blocks[block + 1], dtype=np.int64)
        if not is_partial:
            return documents
        # A document has a seeded phase in [0, 1), and is visited whenever phase + epochs * weight passes an integer:
        # after any number of epochs its visits are within one of their due. 32 bits keep the sum exact in a double.
        weight = self._block_weights[block]
        phase = (splitmix64(documents.astype(np.uint64) ^ hash_key(self._seed, _PHASE)) >> np.uint64(32)) * 2.0**-32
        visits = np.floor(phase + (self._epoch + 1) * weight) - np.floor(phase + self._epoch * weight)
        return documents[visits > np.floor(weight)]
