"""Reads a source's file of any kind: all of its rows, or those that `take` selects.

`take` asks for the first rows or for a random choice by a seed, as a number or a share of the rows. For a share or a
choice all rows are counted first, by a pass over the source or from Parquet's footers. The choice is that of
`datasets.Dataset.shuffle(seed)` cut to that number of rows; the epoch's plan decides their order. If rows
are held out, a data set uses one `Part` of the taken rows. A number of held-out rows needs a pass over all rows, too.
"""

import csv
import hashlib
import heapq
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from trainer.data.format.formats import or_error
from trainer.data.source.files import SourceFile, Take, split_suffix
from trainer.data.source.rows import TEXTS, Batch, Content, OnBad, Row, at
from trainer.errors import DataError
from trainer.processes.helper_thread import patiently

# Readers raise these errors for damaged content. Damaged sizes may ask for more memory than there is.
_DAMAGE = (OSError, ValueError, ArithmeticError, MemoryError, RecursionError, csv.Error)


def batches(file: SourceFile) -> Iterator[Batch]:
    """The taken rows of a file, always in the same batches.

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
            # Import this only for such files: `plan` looks at the first rows too, and answers sooner without pyarrow.
            from trainer.data.source.binary_rows import read_binary

            found = read_binary(kind, file, compression)
        for batch in found:
            yield replace(batch, form=file.form)
    except _DAMAGE as error:
        reason = at(file.uri, DataError(f"damaged or not of the kind its name says ({error})"))
        raise DataError(f"{reason}. Replace the file.") from error


@dataclass(frozen=True)
class Some:
    """The rows of `content` whose numbers, from 0, are in `kept`. The places of the others hold no row."""

    content: Content
    kept: frozenset[int]

    def rows(self) -> Iterable[Row | DataError | None]:
        number = 0
        for row in self.content.rows():
            yield row if number in self.kept else None
            number += row is not None

    def count(self) -> int:
        return len(self.kept)


def _taken(file: SourceFile, take: Take) -> Iterator[Batch]:
    """The batches of a file with only their taken rows. If the first rows are taken, stops after the last of them."""
    first = sum(map(_count, take.files[: take.files.index(replace(file, take=None))]))
    end = take.skip + _amount(take)
    chosen = _chosen(take) if take.seed is not None else range(take.skip, end)
    for batch in _whole(file):
        if take.seed is None and first >= end:
            return
        count = batch.content.count()
        kept = frozenset(number for number in range(count) if first + number in chosen)
        yield replace(batch, content=Some(batch.content, kept))
        first += count


def _amount(take: Take) -> int:
    """The most rows to take. A share is rounded to the nearest, as `datasets` rounds percentages of a split."""
    return round(take.amount * sum(map(_count, take.files))) if take.amount < 1 else int(take.amount)


@cache
def _chosen(take: Take) -> frozenset[int]:
    import numpy as np

    order = np.random.default_rng(take.seed).permutation(sum(map(_count, take.files)))
    return frozenset(order[take.skip : take.skip + _amount(take)].tolist())


@cache
def _count(file: SourceFile) -> int:
    """The number of rows of a file, including bad ones."""
    if file.key.endswith(".parquet"):
        from trainer.data.source.binary_rows import parquet_rows

        return parquet_rows(file)
    return sum(batch.content.count() for batch in _whole(file))


@dataclass(frozen=True)
class Part:
    """The rows that are used: all of them, or one side of a split that holds out `amount` of them.

    `amount` is a share of the rows below 1, or their number. A row's content and `seed` give the row a digest, and the
    rows with the lowest digests are held out. `border` is the first digest that stays, if it has to be looked for.
    """

    amount: float = 0.0
    seed: int = 0
    held_out: bool = False
    border: int | None = None

    def over(self, files: Sequence[SourceFile]) -> "Part":
        """The same part with its border found, where `amount` is a number, by a pass over all rows of `files`.

        Raises:
            DataError: there are not more rows than that, or a file as a whole is damaged.
        """
        if self.amount < 1:
            return self
        return replace(self, border=_border(tuple(files), self.seed, int(self.amount)))

    def has(self, row: Row) -> bool:
        """Whether the row is on this side. Equal rows are on the same side, wherever they stand."""
        if not self.amount:
            return True
        assert self.amount < 1 or self.border is not None, "Part.over has not looked for the border"
        border = self.amount * 2**64 if self.border is None else self.border
        return (_digest(row, self.seed) < border) == self.held_out

    def rows(self, batch: Batch, on_bad: OnBad) -> list[tuple[str, Row]]:
        """The rows of a batch on this side, with their places. A bad row counts once, on the training side."""
        report: OnBad = (lambda error: None) if self.held_out else on_bad
        rows: list[tuple[str, Row]] = []
        for where, row in batch.rows(report):
            chosen = or_error(self.has, row)
            if isinstance(chosen, DataError):
                report(at(where, chosen))
            elif chosen:
                rows.append((where, row))
        return rows


def _digest(row: Row, seed: int) -> int:
    content = json.dumps(row, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8, salt=seed.to_bytes(8, "little")).digest(), "little")


@lru_cache(maxsize=4)
def _border(files: tuple[SourceFile, ...], seed: int, number: int) -> int:
    """The digest below which `number` rows lie, or fewer if equal rows stand at the border."""
    with patiently("looking for the rows that data.held_out keeps apart"):
        digests = (or_error(lambda row: _digest(row, seed), row) for file in files for _, row in rows(file, _unsaid))
        lowest = heapq.nsmallest(number + 1, (digest for digest in digests if not isinstance(digest, DataError)))
    if len(lowest) <= number:
        raise DataError(
            f"data.held_out: {number:,} rows leave nothing to train on, as data.train has {len(lowest):,}. Hold out"
            " fewer."
        )
    if lowest[0] == lowest[number]:
        raise DataError(
            f"data.held_out: more than {number:,} rows are equal to the first that it would keep apart, and equal rows"
            " stay together. Raise it, set data.held_out_seed, or remove the repeats."
        )
    return lowest[number]


def _unsaid(error: DataError) -> None:
    """Pass over a bad row, which the compilation counts or refuses."""


EVERYTHING = Part()
