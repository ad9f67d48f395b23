"""Finds pictures, sound and video in rows of text. A text about a picture that the model does not get would teach it to
guess."""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from trainer.base.find.media import Modality, modalities
from trainer.data.format.unrendered import strings_of
from trainer.errors import DataError

# The texts that stand for a picture, a video or sound in the rows of LLaVA, LLaMA-Factory and ms-swift.
_STANDS_FOR = re.compile("|".join(modality.tag for modality in modalities()))


class BadPicture(DataError):
    """A picture of a row is missing or damaged, or nothing can be seen in it."""


def refuse_pictures(row: Mapping[str, Any], read: Collection[str]) -> None:
    """Raises `DataError` for a row that has pictures, sound or video beside its text. Its format reads the fields
    `read`.

    A field with a name or an address alone may describe where a text is from. It is a picture of the conversation only
    if a text says where it stands. Lists, and structs of bytes, are what trainers take for pictures.
    """
    for modality, name in ((one, name) for one in modalities() for name in one.fields):
        value = row.get(name)
        if not value or name in read:
            continue
        given = {field: row[field] for field in read if field in row}
        if _holds(value) or any(_STANDS_FOR.search(text) for text in strings_of(given)):
            raise DataError(
                f"it has {name!r} beside its text. Set data.format: pictures to train on {modality.noun}s, or remove"
                " the field to train the text without it"
            )


def names_of(field: str, others: Sequence[str], fields: Mapping[str, str]) -> Sequence[str]:
    """The names that a field may have in a row: the one that `data.fields` gives, or else `others`."""
    return (fields[field],) if field in fields else others


def files_beside(row: Mapping[str, Any], modality: Modality, names: Collection[str]) -> list[Any]:
    """The files of the modality that a row has beside its text, in the field of one of these names.

    Raises `DataError` if two fields have other ones."""
    given = {name: row[name] for name in names if row.get(name)}
    found = {name: list(value) if isinstance(value, (list, tuple)) else [value] for name, value in given.items()}
    (first, files), *others = found.items() if found else [("", [])]
    if different := next((name for name, value in others if value != files), None):
        raise DataError(
            f"it has other {modality.noun}s in {first!r} than in {different!r}. Remove one of them, or set data.fields:"
            f" {{{modality.fields[0]}: {first}}}"
        )
    return files


def _holds(value: Any) -> bool:
    """Whether a field is a list of pictures, or the bytes of one, or a struct with them or its path, as the Hub's
    columns."""
    if isinstance(value, (list, bytes)):
        return True
    return isinstance(value, dict) and any(cast(dict[str, Any], value).get(key) for key in ("bytes", "path", "url"))
