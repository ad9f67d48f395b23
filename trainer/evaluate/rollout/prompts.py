"""The prompts of a run's data in their exact order.

A prompt is everything before the last answer of a document. The reward gets that answer.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import count, islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.dataset.chapters import Chapters
from trainer.data.dataset.dataset import ID_BITS, TARGET_BIT, Blocks
from trainer.data.order.order import WINDOW_BLOCKS, EpochPlan, nothing_visited, turns
from trainer.data.order.settings import Order


class Asked(NamedTuple):
    """A prompt, and the answer that the data has to it, by their tokens."""

    prompt: list[int]
    reference: list[int]


class Prompts:
    """The documents of `chapters` in the `order` of training, `batch` for each step.

    Which documents a step has depends on the number of the step alone.
    """

    def __init__(self, chapters: Chapters, order: Order, batch: int) -> None:
        self._chapters, self._order, self._batch = chapters, order, batch
        self._next, self._documents = 0, self._visited()
        self._blocks = lru_cache(maxsize=WINDOW_BLOCKS)(self._read)  # the blocks of a window are read again and again

    def of(self, step: int) -> list[Asked]:
        """Return the prompts of the update after `step`."""
        if step < self._next:
            self._next, self._documents = 0, self._visited()
        for _ in islice(self._documents, (step - self._next) * self._batch):
            pass
        self._next = step + 1
        return [_asked(self._tokens(*visit)) for visit in islice(self._documents, self._batch)]

    def _visited(self) -> Iterator[tuple[int, int]]:
        """Yield the chapter and the number in it of every visited document, without end."""
        for epoch in count():
            visited = False
            for turn, chapter in enumerate(turns(self._chapters.count, self._order.seed, epoch)):
                data = self._chapters.get(chapter)
                plan = EpochPlan(data.offsets, data.blocks, data.block_sources, self._order, epoch, turn)
                for window in range(plan.num_windows):
                    for document in plan.window(window).documents.tolist():
                        visited = True
                        yield chapter, document
            if not visited:
                raise nothing_visited(epoch, self._order)

    def _tokens(self, chapter: int, document: int) -> NDArray[np.uint32]:
        block = int(np.searchsorted(self._chapters.get(chapter).blocks, document, side="right")) - 1
        return self._blocks(chapter, block).gather(np.array([document]))

    def _read(self, chapter: int, block: int) -> Blocks:
        return self._chapters.get(chapter).read(np.array([block]))


def _asked(stored: NDArray[np.uint32]) -> Asked:
    targets = np.flatnonzero(stored & TARGET_BIT)
    first = targets[np.flatnonzero(np.diff(targets, prepend=-2) > 1)[-1]]  # of the last answer
    ids = (stored & ID_BITS).tolist()
    return Asked(ids[: max(first, 1)], ids[max(first, 1) : targets[-1] + 1])
