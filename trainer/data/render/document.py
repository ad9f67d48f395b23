"""What a renderer is, and the documents that it makes of rows."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from trainer.errors import DataError


class Turn(NamedTuple):
    """One message: the role that says it and its text; `calls` says whether it has a call of a tool."""

    role: str
    content: str
    calls: bool = False


class Document(ABC):
    """A row, tokenized."""

    tokens: NDArray[np.uint32]
    """(n,) of the document as it is stored."""
    targets: NDArray[np.bool_]
    """(n,) whether each is trained. The first never is: nothing predicts it."""
    left_out: Sequence[str]
    """The names of what the row carries and its text does not contain."""

    @property
    def teaches(self) -> bool:
        """Whether anything of it is trained."""
        return bool(self.targets.any())

    @property
    def longest(self) -> int:
        """The tokens of the shortest row that holds it, or each of the documents that it falls into."""
        return len(self.tokens)

    @property
    def columns(self) -> Mapping[str, Any]:
        """The values of the columns that its kind declares, by their names."""
        return {}

    @property
    def counts(self) -> Mapping[str, int]:
        """Its part in the counters of the data set, once it is stored."""
        return {}

    @abstractmethod
    def cut(self, limit: int) -> Self:
        """Its beginning, with at most `limit` tokens in a row."""

    def pieces(self, limit: int) -> Sequence["Document"]:
        """Documents of at most `limit` tokens that it becomes: itself, unless rows of its kind are split."""
        return [self]

    @abstractmethod
    def stored(self) -> NDArray[np.uint32]:
        """The tokens as a data set holds them, (n,), with their bits (trainer/data/dataset/binary.py)."""


class RowRenderer(Protocol):
    """Encodes rows of one kind with one tokenizer. Made when the first rows of the kind come; it raises `ConfigError`
    where the tokenizer cannot serve them.
    """

    def encode(self, rows: Sequence[dict[str, Any]]) -> Sequence[Document | DataError]:
        """Each row's document, or what is wrong with it; the error's text has no place in it."""
        ...

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        """The turns of a row. Raises `DataError` where it is none of this kind."""
        ...
