"""The rows of a source that are taken, `take`: its first ones, or a choice by a seed, as a number or as a share of them.

A share and a choice are known once all rows are counted: a pass over the source, or a look into Parquet's footers. The choice is
that of `datasets.Dataset.shuffle(seed)` cut to as many rows; its order is left to the epoch's plan.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from trainer.data.format.formats import Row
from trainer.data.source.files import SourceFile, Take
from trainer.data.source.rows import Batch, Content
from trainer.errors import DataError

Read = Callable[[SourceFile], Iterator[Batch]]
"""Reads a file in batches, whole."""


@dataclass(frozen=True)
class Some:
    """Rows of `content`: those that are `kept`, by their numbers in it from 0. In the places of the others there is none."""

    content: Content
    kept: frozenset[int]

    def rows(self) -> Iterable[Row | DataError | None]:
        number = 0
        for row in self.content.rows():
            yield row if row is not None and number in self.kept else None
            number += row is not None

    def count(self) -> int:
        return len(self.kept)


def taken(file: SourceFile, take: Take, read: Read) -> Iterator[Batch]:
    """The batches of a file, with the rows in them that are taken; none behind the last of the first so many."""
    first = sum(_count(other, read) for other in take.files[: take.files.index(replace(file, take=None))])
    end = _amount(take, read) if take.counted else int(take.amount)
    chosen = _chosen(take, read) if take.seed is not None else range(end)
    for batch in read(file):
        if take.seed is None and first >= end:
            return
        count = batch.content.count()
        kept = frozenset(number for number in range(count) if first + number in chosen)
        yield replace(batch, content=Some(batch.content, kept))
        first += count


def _amount(take: Take, read: Read) -> int:
    """A share is rounded as `datasets` rounds percentages of a split: to the nearest."""
    total = sum(_count(file, read) for file in take.files)
    return round(take.amount * total) if take.amount < 1 else min(int(take.amount), total)


@cache
def _chosen(take: Take, read: Read) -> frozenset[int]:
    import numpy as np

    order = np.random.default_rng(take.seed).permutation(sum(_count(file, read) for file in take.files))
    return frozenset(order[: _amount(take, read)].tolist())


@cache
def _count(file: SourceFile, read: Read) -> int:
    """The rows of a file, bad ones among them."""
    if file.key.endswith(".parquet"):
        from trainer.data.source.binary_rows import parquet_rows

        return parquet_rows(file)
    return sum(batch.content.count() for batch in read(file))
