"""The order of an epoch: which documents share a bin, and in which order bins are used.

A window of an epoch is a pure function of (lengths and blocks of its chapter, the order's settings, epoch, number of
the window). It does not depend on ranks, so any number of them takes the same bins in the same global order. It does
not depend on other windows, so a run resumes by planning only the window in which it stopped.

    chapters of the data set, one after the other
    -> blocks of a chapter's documents -> seeded permutation -> windows of 64 blocks -> bins, packed in a window
    -> seeded permutation of the bins in a window

Nearly every data set is one chapter. If there are several, the first epoch takes each as soon as it is compiled.

Documents are read in blocks, so that a rank reads a few long ranges. A rank holds whole windows in memory. A bin is a
row of a fixed number of tokens, which best-fit-decreasing packing fills with documents.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainer.data.order.settings import Order
from trainer.errors import DataError

WINDOW_BLOCKS = 64

_BLOCKS, _TIES, _BINS, _PHASE, _CHAPTERS = 1, 2, 3, 4, 5


def splitmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014), element by element.

    Capstan has its own because the order must not change with a library: NumPy does not promise a Generator's stream.
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
    """The permutation of range(count) that `key` determines."""
    return np.argsort(splitmix64(np.arange(count, dtype=np.uint64) ^ hash_key(*key)), kind="stable")


def turns(chapters: int, seed: int, epoch: int) -> list[int]:
    """The chapters in the order in which an epoch takes them. The first epoch takes them as they are compiled."""
    return permutation(chapters, seed, epoch, _CHAPTERS).tolist() if epoch else list(range(chapters))


@dataclass(frozen=True, eq=False)
class Window:
    """A window: the blocks to read, and its bins. Bin k holds `documents[borders[k] : borders[k + 1]]`.

    `blocks` (at most 64,) int64 is sorted.
    """

    blocks: NDArray[np.int64]
    documents: NDArray[np.int64]
    borders: NDArray[np.int64]

    @property
    def num_bins(self) -> int:
        return len(self.borders) - 1

    def bin(self, k: int) -> NDArray[np.int64]:
        """The documents of bin k, in their order in the row, (documents,) int64."""
        return self.documents[self.borders[k] : self.borders[k + 1]]


@dataclass(eq=False)
class EpochPlan:
    """The windows of one epoch in one chapter.

    Attributes:
        offsets: (documents + 1,) int64, where each document begins in the chapter, in tokens, and the end.
        blocks: (blocks + 1,) int64, the first document of each block, and the number of documents.
        block_sources: (blocks,) int32, the source that a block's documents come from.
        turn: the place of the chapter in the epoch's order of chapters, from 0.

    At weight 1 every document is in exactly one bin of every epoch.
    """

    offsets: NDArray[np.int64]
    blocks: NDArray[np.int64]
    block_sources: NDArray[np.int32]
    order: Order
    epoch: int
    turn: int = 0

    def __post_init__(self) -> None:
        order, block_sources = self.order, self.block_sources
        self._key = self.epoch + (self.turn << 32)  # so that chapters of the same size get different permutations
        tokens = np.bincount(block_sources, np.diff(self.offsets[self.blocks]), minlength=len(order.weights))
        weights = order.weights_for(tokens.astype(np.int64).tolist())
        self._block_weights = np.asarray(weights, np.float64)[block_sources]
        # A visit takes all documents of a block. The visit for the fraction of the weight takes only some of them.
        whole = np.floor(self._block_weights).astype(np.int64)
        partial = self._block_weights > whole
        # Whole blocks of a large source take turns, so that a small share of the source does not require reading all of
        # it.
        for source in np.flatnonzero(np.bincount(block_sources[partial]) >= WINDOW_BLOCKS):
            mine = np.flatnonzero(block_sources == source)
            phase = (permutation(len(mine), order.seed, _PHASE, int(source)) + 0.5) / len(mine)
            whole[mine] = _visits(phase, weights[source], self.epoch)
            partial[mine] = False
        partial = np.flatnonzero(partial)
        visits = np.concatenate([np.repeat(np.arange(len(whole)), whole), partial])
        is_partial = np.arange(len(visits)) >= whole.sum()
        sequence = permutation(len(visits), order.seed, self._key, _BLOCKS)
        self._visits, self._is_partial = visits[sequence], is_partial[sequence]
        self.window = lru_cache(maxsize=4)(self._window)

    @property
    def num_windows(self) -> int:
        return -(-len(self._visits) // WINDOW_BLOCKS)

    def count_bins(self) -> list[int]:
        """The number of bins of each window. Packs the whole chapter: about a second for three million documents."""
        return [self._window(index).num_bins for index in range(self.num_windows)]

    def _window(self, index: int) -> Window:
        part = slice(index * WINDOW_BLOCKS, (index + 1) * WINDOW_BLOCKS)
        visits, is_partial = self._visits[part], self._is_partial[part]
        documents = np.concatenate([self._documents(int(b), bool(p)) for b, p in zip(visits, is_partial, strict=True)])
        documents = documents[permutation(len(documents), self.order.seed, self._key, _TIES, index)]
        if self.order.packing:
            lengths = self.offsets[documents + 1] - self.offsets[documents]
            longest_first = np.argsort(-lengths, kind="stable")
            documents = documents[longest_first]
            bins = self._packed(documents, lengths[longest_first] + self.order.beside)
        else:
            bins = np.arange(len(documents))
        sizes = np.bincount(bins)
        sequence = permutation(len(sizes), self.order.seed, self._key, _BINS, index)
        place = np.empty_like(sequence)
        place[sequence] = np.arange(len(sequence))
        return Window(
            blocks=np.unique(visits),
            documents=documents[np.argsort(place[bins], kind="stable")],
            borders=np.concatenate([[0], np.cumsum(sizes[sequence])]).astype(np.int64),
        )

    def _packed(self, documents: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """The bin of each visit, (documents,). No bin holds a document twice.

        The first visits of all documents are packed first, then the second visits, and so on.
        """
        by_document = np.argsort(documents, kind="stable")
        sorted_ = documents[by_document]
        number = np.empty_like(documents)  # the number of the visit among the document's visits
        number[by_document] = np.arange(len(documents)) - np.searchsorted(sorted_, sorted_)
        bins, used = np.empty_like(documents), 0
        for visit in range(int(number.max(initial=-1)) + 1):
            mine = number == visit
            bins[mine] = used + best_fit_decreasing(lengths[mine], self.order.capacity)
            used = int(bins[mine].max()) + 1
        return bins

    def _documents(self, block: int, is_partial: bool) -> NDArray[np.int64]:
        documents = np.arange(self.blocks[block], self.blocks[block + 1], dtype=np.int64)
        if not is_partial:
            return documents
        weight = self._block_weights[block]
        # 32 bits keep the sum of phase and visits exact in a double.
        phase = (
            splitmix64(documents.astype(np.uint64) ^ hash_key(self.order.seed, _PHASE)) >> np.uint64(32)
        ) * 2.0**-32
        return documents[_visits(phase, weight, self.epoch) > np.floor(weight)]


def _visits(phase: NDArray[np.floating], weight: float, epoch: int) -> NDArray[np.int64]:
    """The visits of a document or block in an epoch: one each time that phase + epochs * weight passes an integer.

    `phase` is in [0, 1). After any number of epochs the number of visits differs from epochs * weight by less than one.
    """
    return (np.floor(phase + (epoch + 1) * weight) - np.floor(phase + epoch * weight)).astype(np.int64)


def nothing_visited(epoch: int, order: Order) -> DataError:
    """The error for an epoch whose weights leave no document to visit."""
    return DataError(
        f"data.train: epoch {epoch} visits no document, as weights of {', '.join(map(str, order.weights))} are too "
        "small for so few documents. Raise a weight."
    )


def best_fit_decreasing(lengths: NDArray[np.integer], capacity: int) -> NDArray[np.int64]:
    """The bin of each document, (documents,) int64; no bin holds more than `capacity` tokens.

    `lengths` (documents,) must be sorted in descending order. Each document goes into the fullest bin that still has
    room for it. Documents of equal length keep their order, so a caller shuffles by permuting them.

    Documents of one length are placed together: once the fullest bin has taken the first of them, it is still the
    fullest bin for the next one, as long as it has room. So each bin that a length visits costs one search in the
    sorted list of rooms (tokens left): about 0.2 microseconds a document, whatever the capacity.
    """
    assert lengths.size == 0 or 0 < lengths[-1] <= lengths[0] <= capacity
    bins: list[int] = []
    num_bins = 0
    rooms: list[int] = []  # sorted, each once
    bins_with_room: dict[int, list[int]] = {}
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            place = bisect_left(rooms, length)
            if place < len(rooms):
                room = rooms[place]
                same = bins_with_room[room]
                chosen = same.pop()
                if not same:
                    del rooms[place], bins_with_room[room]
            else:
                room, chosen = capacity, num_bins
                num_bins += 1
            taken = min(count, room // length)
            bins += [chosen] * taken
            count -= taken
            left = room - taken * length
            if left in bins_with_room:
                bins_with_room[left].append(chosen)
            elif left:
                bins_with_room[left] = [chosen]
                insort(rooms, left)
    return np.array(bins, np.int64)
