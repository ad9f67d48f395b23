"""Turns a row with a class into a document: the text's tokens, and behind them the number of its class, stored as a trained token; or, where
a row may have several classes, for each class a 1 or a 0.

So the text's last token is the first place whose label is to be predicted, and its label is the number. The model reads the
numbers as tokens too, but behind all that counts: in a causal model nothing before them can see them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from trainer.base.tokenizer import Tokenizer
from trainer.config import Data
from trainer.data.dataset.binary import TARGET_BIT
from trainer.data.format.formats import or_error
from trainer.data.format.known.classified import label_name
from trainer.data.render.answers import EitherRenderer
from trainer.data.render.chat import Example, Turn, field_of
from trainer.errors import DataError


@dataclass(frozen=True, eq=False)
class Numbered:
    """A text's tokens, (n,) uint32, and behind them `numbers`, (m,) uint32; those that are `trained`, (m,) bool, are to be predicted."""

    text: NDArray[np.uint32]
    numbers: NDArray[np.uint32]
    trained: NDArray[np.bool_]
    left_out: Sequence[str] = ()

    @property
    def tokens(self) -> NDArray[np.uint32]:
        return np.concatenate([self.text, self.numbers])

    @property
    def targets(self) -> NDArray[np.bool_]:
        return np.concatenate([np.zeros(len(self.text), np.bool_), self.trained])

    def pieces(self, limit: int) -> list[Self]:
        """Itself: a text is never split from what is said of it."""
        return [self]

    def stored(self) -> NDArray[np.uint32]:
        """The tokens as a data set holds them, (n + m,)."""
        return self.tokens | self.targets * TARGET_BIT


class Classified(Numbered):
    """A text and the number of its class, or the flags of all classes."""

    @property
    def teaches(self) -> bool:
        """Whether there is a text to tell the class from."""
        return len(self.text) > 0

    def cut(self, limit: int) -> "Classified":
        """The beginning of the text, with its class `limit` tokens. Nothing is left where there are more classes."""
        return replace(self, text=self.text[: max(0, limit - len(self.numbers))])


class ClassifiedRenderer:
    """Encodes rows of the kinds classified and multilabel with one tokenizer: a conversation by the chat template, a text as the tokenizer itself frames it.

    Tokens of padding at the end are left out: transformers' classifiers look at the last token that is none.
    """

    def __init__(self, tokenizer: Tokenizer, data: Data) -> None:
        self._tokenizer, self._data = tokenizer, data
        self._numbers = {name: number for number, name in enumerate(data.labels or ())}
        texts = {"format": "text", "template": None, "fields": {"text": data.fields.get("text", "text")}}
        messages = {"format": "chat", "loss_on": "all"}
        self._examples = EitherRenderer(tokenizer, data, messages, texts, ends=False)

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Classified | DataError]:
        """Each row's text with its class, or what is wrong with it. Raises `ConfigError` as `EitherRenderer`."""
        numbers = [or_error(self._numbers_of, row) for row in rows]
        return list(map(self._classified, self._examples.encode(rows), numbers))

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        """The turns of the conversation; a text is a user's turn. Raises `DataError` where the row is none of this kind."""
        turns = self._examples.turns(row)
        return turns if "messages" in row else [Turn("user", turn.content) for turn in turns]

    def _numbers_of(self, row: dict[str, Any]) -> tuple[int, ...]:
        given = field_of(row, "label", self._data)
        if self._data.kind != "multilabel":
            return (number_of(given, self._numbers),)
        if not isinstance(given, list):
            raise DataError(f"the labels are {given!r}, and no list of classes, which may be empty")
        found = {number_of(value, self._numbers) for value in given}
        return tuple(int(number in found) for number in range(len(self._numbers)))

    def _classified(self, example: Example | DataError, numbers: tuple[int, ...] | DataError) -> Classified | DataError:
        if isinstance(example, DataError):
            return example
        if isinstance(numbers, DataError):
            return numbers
        padding: Any = self._tokenizer.pad_token_id
        kept = np.flatnonzero(example.tokens != (-1 if padding is None else padding))
        text = example.tokens[: int(kept[-1]) + 1 if len(kept) else 0]
        return Classified(text, np.array(numbers, np.uint32), np.ones(len(numbers), np.bool_), example.left_out)


def number_of(value: Any, numbers: Mapping[str, int]) -> int:
    """The number of a class by its name; a whole number that is no name is that of a class itself. Raises `DataError` for any other."""
    name = label_name(value)
    if name in numbers:
        return numbers[name]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(numbers):
        return value
    raise DataError(f"the label is {name!r}, which is none of data.labels ({', '.join(numbers)})")
