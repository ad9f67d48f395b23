"""Encodes rows with one or more answers to a prompt, as messages or as strings, and the documents that they become.

In a document the answers may share the prompt's tokens (`data.share_prefix`):

alone:    p p p P a a a    p p p P b b        both predict their first token from P, the prompt's last one
sharing:  p p p P a a a P b b                 P and b see p p p, and none of a
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.base.tokenizer import Tokenizer
from trainer.config import Data
from trainer.data.dataset.binary import SHARED_BIT
from trainer.data.format.formats import or_error
from trainer.data.format.messages import Message, read_messages
from trainer.data.render.chat import Example, Renderer
from trainer.data.render.document import Document, Turn
from trainer.errors import DataError

Row = dict[str, Any]
Made = TypeVar("Made", bound=Document)


class EitherRenderer:
    """Encodes rows of messages, with the chat template, and rows of strings, without it.

    Each kind has a renderer with the settings `messages` or `texts`, which is made when its first rows come. `ends` is
    that of `Renderer`."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: Data,
        messages: Mapping[str, Any],
        texts: Mapping[str, Any],
        *,
        ends: bool = True,
    ) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        self._settings = {True: data.model_copy(update=messages), False: data.model_copy(update=texts)}
        self._renderers: dict[bool, Renderer] = {}

    def encode(self, rows: Sequence[Row]) -> list[Example | DataError]:
        """Each row's tokens and targets, or its error. A row with `messages` is a conversation.

        Raises:
            ConfigError: the tokenizer cannot serve rows of messages, or of strings, as `chat.Renderer` says.
        """
        found: dict[int, Example | DataError] = {}
        for in_messages in (True, False):
            mine = [number for number, row in enumerate(rows) if ("messages" in row) == in_messages]
            if mine:
                encoded = self._renderer(in_messages).encode([rows[number] for number in mine])
                found |= zip(mine, encoded, strict=True)
        return [found[number] for number in range(len(rows))]

    def turns(self, row: Row) -> list[Turn]:
        """The turns of a row. Raises `DataError` as `chat.Renderer.turns`."""
        return self._renderer("messages" in row).turns(row)

    def _renderer(self, in_messages: bool) -> Renderer:
        if in_messages not in self._renderers:
            self._renderers[in_messages] = Renderer(self._tokenizer, self._settings[in_messages], ends=self._ends)
        return self._renderers[in_messages]


class ReadRow(NamedTuple):
    """A row of chat or of prompt_completion for each answer, the turns, and whether the answer is desired, if known."""

    rows: list[Row]
    turns: list[Turn]
    desired: bool = False


Encoded = tuple[ReadRow, list[Example | DataError]]
"""A row with the examples of its answers."""


class AnswersRenderer(Generic[Made]):
    """Encodes rows of one kind with one tokenizer.

    `read` takes a row apart, and raises `DataError` if it is not of this kind. `documents` gets the rows that are
    encoded together, and makes a document or an error of each."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        data: Data,
        read: Callable[[Row, Data], ReadRow],
        documents: Callable[[list[Encoded], Data], list[Made | DataError]],
    ) -> None:
        self._data, self._documents = data, documents
        self._read: Callable[[Row], ReadRow] = lambda row: read(row, data)
        answers = data.train_on.model_copy(update={"roles": ["assistant"]})
        messages = {"format": "chat", "train_on": answers, "fields": {}}
        texts = {"format": "prompt_completion", "train_on": answers, "fields": {}, "template": None}
        self._answers = EitherRenderer(tokenizer, data, messages, texts)

    def encode(self, rows: Sequence[Row]) -> list[Made | DataError]:
        """Each row's document, or its error, whose text does not name the row's place.

        Raises `ConfigError` as `EitherRenderer`.
        """
        read = [or_error(self._read, row) for row in rows]
        whole = [row for row in read if isinstance(row, ReadRow)]
        examples = iter(self._answers.encode([answer for row in whole for answer in row.rows]))
        encoded = [(row, [next(examples) for _ in row.rows]) for row in whole]
        documents = iter(self._documents(encoded, self._data))
        return [row if isinstance(row, DataError) else next(documents) for row in read]

    def turns(self, row: Row) -> list[Turn]:
        """The turns of the prompt, then those of each answer. Raises `DataError` if the row is not of this kind."""
        return self._read(row).turns


def messages_of(given: Any, name: str) -> list[Message]:
    """The messages in the field `name`. Raises `DataError` if it is not a conversation."""
    try:
        return read_messages(given)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


@dataclass(frozen=True, eq=False)
class Answers(Document):
    """Tokenized answers to one prompt, each with the prompt.

    A packed row holds the first `shared` tokens only once. The first token of answer i is stored with the bit
    `marks[i]`."""

    answers: Sequence[Example]
    shared: int = 0
    marks: Sequence[np.uint32] = ()

    @property
    def _parts(self) -> list[Example]:
        """The answers in the form in which they follow each other in a row."""
        first, *others = self.answers
        return [first, *(Example(one.tokens[self.shared :], one.targets[self.shared :]) for one in others)]

    @property
    def tokens(self) -> NDArray[np.uint32]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return np.concatenate([part.tokens for part in self._parts])

    @property
    def targets(self) -> NDArray[np.bool_]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return np.concatenate([part.targets for part in self._parts])

    @property
    def left_out(self) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return list(dict.fromkeys(name for answer in self.answers for name in answer.left_out))

    @property
    def teaches(self) -> bool:
        return any(answer.teaches for answer in self.answers)

    def stored(self) -> NDArray[np.uint32]:
        parts = [part.stored() for part in self._parts]
        if self.shared:
            for part in parts[1:]:
                part[0] |= SHARED_BIT
        for part, mark in zip(parts, self.marks, strict=False):
            part[0] |= mark
        return np.concatenate(parts)


def prompt_tokens(answer: Example) -> int:
    """The number of tokens before the first trained one."""
    return int(answer.targets.argmax())


def shared_tokens(answer: Example) -> int:
    """The number of tokens that all answers to a prompt can share, from one answer with its prompt.

    It is the whole prompt except its last token, which predicts the first token of each answer."""
    return max(0, prompt_tokens(answer) - 1)
