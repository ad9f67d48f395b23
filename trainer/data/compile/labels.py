"""The names of the classes of some rows."""

from collections.abc import Iterator
from functools import lru_cache

from trainer.data.format.formats import Row, or_error
from trainer.data.format.known.classified import label_name
from trainer.data.source.files import SourceFile
from trainer.data.source.reading import rows
from trainer.errors import DataError


@lru_cache(maxsize=4)
def labels_of(files: tuple[SourceFile, ...]) -> list[str]:
    """The classes of all rows of the files of `data.train`: numbers by their size, else in the order of the alphabet.

    Raises:
        DataError: a file is damaged, or there are not two classes.
    """
    found = {name for file in files for name in _names(file)}
    if not found:
        raise DataError("data.train: no row has a class. Check data.format and data.fields.label.")
    if len(found) == 1:
        raise DataError(
            f"data.train: the class of all rows is {found.pop()!r}. Add rows of another one, or name all in data.labels."
        )
    return sorted(found, key=int) if all(name.isdecimal() for name in found) else sorted(found)


def _names(file: SourceFile) -> Iterator[str]:
    """The classes of the rows that have one; others are bad rows, which the compilation counts or refuses."""
    assert file.form is not None
    names = file.form.names
    called = names.get("label") or names["tags"]

    def read(row: Row) -> list[str]:
        given = row.get(called)
        return [label_name(value) for value in (given if isinstance(given, list) else [given])]

    for _, row in rows(file, lambda _: None):
        found = or_error(read, row)
        if not isinstance(found, DataError):
            yield from found
