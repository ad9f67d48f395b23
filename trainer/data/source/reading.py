"""Reads a source's file, of whatever kind it is."""

import csv
from collections.abc import Iterator
from dataclasses import replace

from trainer.data.format.formats import Row
from trainer.data.source.files import SourceFile, split_suffix
from trainer.data.source.rows import TEXTS, Batch, OnBad, at
from trainer.data.source.take import taken
from trainer.errors import DataError

# Readers raise these for damaged content; the sizes in it may ask for more than any memory.
_DAMAGE = (OSError, ValueError, ArithmeticError, MemoryError, RecursionError, csv.Error)


def batches(file: SourceFile) -> Iterator[Batch]:
    """The rows of a file that are taken, always in the same batches.

    Raises:
        DataError: the file as a whole is damaged.
        StorageError: the file cannot be read.
    """
    return _whole(file) if file.take is None else taken(file, file.take, _whole)


def _whole(file: SourceFile) -> Iterator[Batch]:
    kind, compression = split_suffix(file.key)
    try:
        for batch in _read(kind, file, compression):
            yield replace(batch, form=file.form)
    except _DAMAGE as error:
        reason = at(file.uri, DataError(f"damaged or not of the kind its name says ({error})"))
        raise DataError(f"{reason}. Replace the file.") from error


def rows(file: SourceFile, on_bad: OnBad) -> Iterator[tuple[str, Row]]:
    """Every row of a file; see `Batch.rows` and `batches`."""
    for batch in batches(file):
        yield from batch.rows(on_bad)


def _read(kind: str, file: SourceFile, compression: str | None) -> Iterator[Batch]:
    if kind in TEXTS:
        return TEXTS[kind](file, compression)
    # Only for such files: `plan` looks at the first rows too, and answers sooner without pyarrow.
    from trainer.data.source.binary_rows import read_binary

    return read_binary(kind, file, compression)
