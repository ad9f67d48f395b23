"""The interfaces of a renderer and of the documents that it makes from rows."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from trainer.data.dataset.pictures import PictureWriter
from trainer.errors import DataError


class _Reading(NamedTuple):
    uri: str = ""
    pictures: PictureWriter | None = None


_READING: ContextVar[_Reading] = ContextVar("reading", default=_Reading())  # noqa: B039 (it cannot change)


@contextmanager
def reading(uri: str, pictures: PictureWriter | None = None) -> Iterator[None]:
    """Inside, rows of the file `uri` are encoded, and their pictures are kept by `pictures`."""
    before = _READING.set(_Reading(uri, pictures))
    try:
        yield
    finally:
        _READING.reset(before)


def file_of_rows() -> str:
    """The URI of the file whose rows are encoded. Empty for rows that are in no file."""
    return _READING.get().uri


def pictures_of_rows() -> PictureWriter | None:
    """The writer that keeps the pictures of encoded rows. None where rows are only looked at."""
    return _READING.get().pictures


class Turn(NamedTuple):
    """One message: its role and its text. `calls` says whether it calls a tool."""

    role: str
    content: str
    calls: bool = False


class Document(ABC):
    """A tokenized row."""

    tokens: NDArray[np.uint32]
    """The tokens of the document as it is stored, (n,)."""
    targets: NDArray[np.bool_]
    """Whether each token is trained, (n,). The first never is, because nothing predicts it."""
    left_out: Sequence[str]
    """The names of parts of the row that its text does not contain."""

    @property
    def teaches(self) -> bool:
        """Whether any of its tokens is trained."""
        return bool(self.targets.any())

    @property
    def longest(self) -> int:
        """The tokens of the shortest packed row that can hold it, or each of the documents into which it is split."""
        return len(self.tokens)

    @property
    def columns(self) -> Mapping[str, Any]:
        """The values of the columns that its kind declares, by name."""
        return {}

    @property
    def counts(self) -> Mapping[str, int]:
        """The numbers that it adds to the counters of the data set once it is stored."""
        return {}

    @abstractmethod
    def cut(self, limit: int) -> Self:
        """Its beginning, which takes at most `limit` tokens in a packed row."""

    def pieces(self, limit: int) -> Sequence["Document"]:
        """The documents of at most `limit` tokens that it becomes: itself, unless rows of its kind are split."""
        return [self]

    @abstractmethod
    def stored(self) -> NDArray[np.uint32]:
        """The tokens as a data set holds them, (n,), with their bits (trainer/data/dataset/dataset.py)."""


class RowRenderer(Protocol):
    """Encodes rows of one kind with one tokenizer.

    It is made when the first rows of the kind come, and raises `ConfigError` if the tokenizer cannot encode them.
    """

    def encode(self, rows: Sequence[dict[str, Any]]) -> Sequence[Document | DataError]:
        """Each row's document, or its error. The error's text does not name the row's place."""
        ...

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        """The turns of a row. Raises `DataError` if it is not of this kind."""
        ...
