"""Reads a source's file, of whatever kind it is: all of its rows, or those that `take` leaves.

`take` asks for the first rows, or for a choice by a seed, as a number or as a share of them. A share and a choice are
known once all rows are counted: a pass over the source, or a look into Parquet's footers. The choice is that of
`datasets.Dataset.shuffle(seed)` cut to as many rows; its order is left to the epoch's plan.
"""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache

from trainer.data.format.formats import Row
from trainer.data.source.files import SourceFile, Take, split_suffix
from trainer.data.source.rows import TEXTS, Batch, Content, OnBad, at
from trainer.errors import DataError

# Readers raise these for damaged content; the sizes in it may ask for more than any memory.
_DAMAGE = (OSError, ValueError, ArithmeticError, MemoryError, RecursionError, csv.Error)


def batches(file: SourceFile) -> Iterator[Batch]:
    """The rows of a file that are taken, always in the same batches.

    Raises:
        DataError: the file as a whole is damaged.
        StorageError: the file cannot be read.
    """
    return _taken(file, file.take) if file.take is not None else _whole(file)


def rows(file: SourceFile, on_bad: OnBad) -> Iterator[tuple[str, Row]]:
    """Every row of a file; see `Batch.rows` and `batches`."""
    for batch in batches(file):
        yield from batch.rows(on_bad)


def _whole(file: SourceFile) -> Iterator[Batch]:
    kind, compression = split_suffix(file.key)
    try:
        if kind in TEXTS:
            found = TEXTS[kind](file, compression)
        else:
            # Only for such files: `plan` looks at the first rows too, and answers sooner without pyarrow.
            from trainer.data.source.binary_rows import read_binary

            found = read_binary(kind, file, compression)
        for batch in found:
            yield replace(batch, form=file.form)
    except _DAMAGE as error:
        reason = at(file.uri, DataError(f"damaged or not of the kind its name says ({error})"))
        raise DataError(f"{reason}. Replace the file.") from error


@dataclass(frozen=True)
class Some:
    """Rows of `content`: those that are `kept`, by their numbers in it from 0. In the places of the others there is
    none.
    """

    content: Content
    kept: frozenset[int]

    def rows(self) -> Iterable[Row | DataError | None]:
        number = 0
        for row in self.content.rows():
            yield row if row is not None and number in self.kept else None
            number += row is not None

    def count(self) -> int:
        return len(self.kept)


def _taken(file: SourceFile, take: Take) -> Iterator[Batch]:
    """The batches of a file, with the rows in them that are taken; none behind the last of the first so many."""
    first = sum(map(_count, take.files[: take.files.index(replace(file, take=None))]))
    end = _amount(take) if take.counted else int(take.amount)
    chosen = _chosen(take) if take.seed is not None else range(end)
    for batch in _whole(file):
        if take.seed is None and first >= end:
            return
        count = batch.content.count()
        kept = frozenset(number for number in range(count) if first + number in chosen)
        yield replace(batch, content=Some(batch.content, kept))
        first += count


def _amount(take: Take) -> int:
    """A share is rounded as `datasets` rounds percentages of a split: to the nearest."""
    total = sum(map(_count, take.files))
    return round(take.amount * total) if take.amount < 1 else min(int(take.amount), total)


@cache
def _chosen(take: Take) -> frozenset[int]:
    import numpy as np

    order = np.random.default_rng(take.seed).permutation(sum(map(_count, take.files)))
    return frozenset(order[: _amount(take)].tolist())


@cache
def _count(file: SourceFile) -> int:
    """The rows of a file, bad ones among them."""
    if file.key.endswith(".parquet"):
        from trainer.data.source.binary_rows import parquet_rows

        return parquet_rows(file)
    return sum(batch.content.count() for batch in _whole(file))
