"""Turns a row with a class into a document: the text's tokens, and behind them the number of its class, stored as a trained token; or, where
a row may have several classes, for each class a 1 or a 0.

So the text's last token is the first place whose label is to be predicted, and its label is the number. The model reads the
numbers as tokens too, but behind all that counts: in a causal model nothing before them can see them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.config import Data
from trainer.data.dataset.binary import TARGET_BIT
from trainer.data.format.formats import or_error
from trainer.data.format.known.classified import label_name
from trainer.data.render.chat import Example, Renderer, Turn, field_of
from trainer.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)
class Classified:
    """A text and the number of its class, or the flags of all classes."""

    text: Example
    numbers: tuple[int, ...]

    @property
    def tokens(self) -> NDArray[np.uint32]:
        return np.append(self.text.tokens, np.array(self.numbers, np.uint32))

    @property
    def targets(self) -> NDArray[np.bool_]:
        return np.repeat([False, True], [len(self.text.tokens), len(self.numbers)])

    @property
    def left_out(self) -> Sequence[str]:
        return self.text.left_out

    @property
    def teaches(self) -> bool:
        """Whether there is a text to tell the class from."""
        return len(self.text.tokens) > 0

    def cut(self, limit: int) -> "Classified":
        """The beginning of the text, with its class `limit` tokens. Nothing is left where there are more classes."""
        return Classified(self.text.cut(max(0, limit - len(self.numbers))), self.numbers)

    def pieces(self, limit: int) -> "list[Classified]":
        """Itself: a text with classes is never split."""
        return [self]

    def stored(self) -> NDArray[np.uint32]:
        return self.tokens | self.targets * TARGET_BIT


class ClassifiedRenderer:
    """Encodes rows of the kinds classified and multilabel with one tokenizer: a conversation by the chat template, a text as the tokenizer itself frames it.

    Tokens of padding at the end are left out: transformers' classifiers look at the last token that is none.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", data: Data) -> None:
        self._tokenizer, self._data = tokenizer, data
        self._numbers = {name: number for number, name in enumerate(data.labels or ())}

    @cached_property
    def _messages(self) -> Renderer:
        return Renderer(self._tokenizer, self._data.model_copy(update={"format": "chat", "loss_on": "all"}))

    @cached_property
    def _texts(self) -> Renderer:
        settings = {"format": "text", "template": None, "fields": {"text": self._data.fields.get("text", "text")}}
        return Renderer(self._tokenizer, self._data.model_copy(update=settings), ends=False)

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Classified | DataError]:
        """Each row's text with its class, or what is wrong with it.

        Raises:
            ConfigError: the tokenizer cannot serve rows of messages, or of texts, as `chat.Renderer` says.
        """
        numbers = [or_error(self._numbers_of, row) for row in rows]
        found = dict[int, Classified | DataError]()
        for in_messages in (True, False):
            mine = [place for place, row in enumerate(rows) if ("messages" in row) == in_messages]
            if mine:
                renderer = self._messages if in_messages else self._texts
                examples = renderer.encode([rows[place] for place in mine])
                found |= {
                    place: self._classified(example, numbers[place])
                    for place, example in zip(mine, examples, strict=True)
                }
        return [found[place] for place in range(len(rows))]

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        """The turns of the conversation; a text is a user's turn.

        Raises:
            DataError: the row is none of this kind.
        """
        if "messages" in row:
            return self._messages.turns(row)
        return [Turn("user", turn.content) for turn in self._texts.turns(row)]

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
        kept = np.flatnonzero(example.tokens != (-1 if self._padding is None else self._padding))
        return Classified(example.cut(int(kept[-1]) + 1 if len(kept) else 0), numbers)

    @property
    def _padding(self) -> int | None:
        padding: Any = self._tokenizer.pad_token_id
        return padding


def number_of(value: Any, numbers: Mapping[str, int]) -> int:
    """The number of a class by its name; a whole number that is no name is that of a class itself. Raises `DataError` for any other."""
    name = label_name(value)
    if name in numbers:
        return numbers[name]
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(numbers):
        return value
    raise DataError(f"the label is {name!r}, which is none of data.labels ({', '.join(numbers)})")
