"""Turns a row with a class, or with tagged words, into a document: the text's tokens, followed by numbers.

Classes: the number of the class follows the text, stored as a trained token. If a row may have several classes, a 1 or
a 0 follows for each class. So the text's last token is the first place with a label, and the number is that label. The
model reads the numbers as tokens too, but in a causal model no earlier token can see them.

Tags: the text is the words joined by spaces, as the tokenizer frames it, and a number follows for each token. The
number of a word's first token is its tag and is trained; no other number is. The numbers are a segment of their own,
which no model reads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.base.base import Tokenizer
from trainer.config import Data
from trainer.data.dataset.dataset import MISMATCHED_BIT, TARGET_BIT
from trainer.data.dataset.pictures import NO_PICTURES, apart, columns_of, cut_before
from trainer.data.format.formats import or_error
from trainer.data.format.known.classified import Classes
from trainer.data.format.messages import text_of
from trainer.data.render.answers import AnswerRenderer, EitherRenderer
from trainer.data.render.chat import Example, field_of
from trainer.data.render.document import Document, Turn
from trainer.errors import DataError


@dataclass(frozen=True, eq=False)
class Numbered(Document):
    """A text's tokens, (n,) uint32, then `numbers`, (m,) uint32. Those that are `trained`, (m,) bool, are predicted."""

    text: NDArray[np.uint32]
    numbers: NDArray[np.uint32]
    trained: NDArray[np.bool_]
    left_out: Sequence[str] = ()
    pictures: NDArray[np.void] = field(default_factory=lambda: NO_PICTURES)
    together: Callable[[], bool] = apart

    @property
    def columns(self) -> Mapping[str, Any]:
        return columns_of(self.pictures)

    @property
    def tokens(self) -> NDArray[np.uint32]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return np.concatenate([self.text, self.numbers])

    @property
    def targets(self) -> NDArray[np.bool_]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return np.concatenate([np.zeros(len(self.text), np.bool_), self.trained])

    def stored(self) -> NDArray[np.uint32]:
        return self.tokens | self.targets * TARGET_BIT


class Classified(Numbered):
    """A text and the number of its class, or the flags of all classes."""

    @property
    def teaches(self) -> bool:
        """Whether there is any text from which to predict the class."""
        return len(self.text) > 0

    def cut(self, limit: int) -> "Classified":
        """The beginning of the text, so that it has `limit` tokens with its class. Empty if the classes need more."""
        limit, pictures = cut_before(self.pictures, max(0, limit - len(self.numbers)), self.together)
        return replace(self, text=self.text[:limit], pictures=pictures)


class ClassifiedRenderer:
    """Encodes rows of the kinds classified and multilabel with one tokenizer.

    The chat template renders a conversation; the tokenizer itself frames a text. Padding tokens at the end are left
    out, because transformers' classifiers read the last token that is not padding. `rendered` makes what encodes the
    conversations from the settings for them; by default it is an `EitherRenderer`.
    """

    def __init__(
        self, tokenizer: Tokenizer, data: Data, rendered: "Callable[[Data], AnswerRenderer] | None" = None
    ) -> None:
        self._tokenizer, self._data, self._classes = tokenizer, data, Classes(data.labels or ())
        texts = {"format": "text", "template": None, "fields": {"text": data.fields.get("text", "text")}}
        messages = {"format": "chat", "train_on": data.train_on.model_copy(update={"roles": "all"})}
        self._examples: AnswerRenderer = (
            EitherRenderer(tokenizer, data, messages, texts, ends=False)
            if rendered is None
            else rendered(data.model_copy(update=messages))
        )

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Classified | DataError]:
        """Each row's text with its class, or its error. Raises `ConfigError` as `EitherRenderer`."""
        numbers = [or_error(self._numbers_of, row) for row in rows]
        return list(map(self._classified, self._examples.encode(rows), numbers))

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        """The turns of the conversation. A text is a user's turn. Raises `DataError` if the row is not of this kind."""
        turns = self._examples.turns(row)
        return turns if "messages" in row else [Turn("user", turn.content) for turn in turns]

    def _numbers_of(self, row: dict[str, Any]) -> tuple[int, ...]:
        given = field_of(row, "label", self._data)
        if not self._data.kind.startswith("multilabel"):
            return (self._classes.number(given),)
        if not isinstance(given, list):
            raise DataError(f"the labels are {given!r}, and no list of classes, which may be empty")
        found = set(map(self._classes.number, given))
        return tuple(int(number in found) for number in range(len(self._classes)))

    def _classified(self, example: Example | DataError, numbers: tuple[int, ...] | DataError) -> Classified | DataError:
        if isinstance(example, DataError):
            return example
        if isinstance(numbers, DataError):
            return numbers
        text = example.tokens[: length_without_padding(example.tokens, self._tokenizer)]
        every = np.ones(len(numbers), np.bool_)
        return Classified(text, np.array(numbers, np.uint32), every, example.left_out, example.places, example.together)


def length_without_padding(tokens: Any, tokenizer: Tokenizer) -> int:
    """How many of a text's `tokens` are before padding at its end. transformers' classifiers read the last of them."""
    padding: Any = tokenizer.pad_token_id
    kept = np.flatnonzero(np.asarray(tokens) != (-1 if padding is None else padding))
    return int(kept[-1]) + 1 if len(kept) else 0


@dataclass(frozen=True, eq=False)
class Tagged(Numbered):
    """A text and the number of each token's tag. Only tokens that begin a word are trained.

    `places` has the first token of each word. A token that begins several words can carry only one tag. If these words
    have the same tag, it is trained once. If not, it is not trained, and the words count as `untagged`.
    """

    places: Sequence[int] = ()
    untagged: int = 0

    @property
    def counts(self) -> Mapping[str, int]:
        return {"untagged": self.untagged} if self.untagged else {}

    def cut(self, limit: int) -> "Tagged":
        """The beginning of the text, so that it has at most `limit` tokens with its tags."""
        kept = limit // 2
        places = [place for place in self.places if place < kept]
        return replace(
            self, text=self.text[:kept], numbers=self.numbers[:kept], trained=self.trained[:kept], places=places
        )

    def stored(self) -> NDArray[np.uint32]:
        """The tokens as a data set holds them. The numbers are a segment of their own."""
        stored = super().stored()
        stored[len(self.text)] |= MISMATCHED_BIT
        return stored


class TaggedRenderer:
    """Encodes rows of the kind tagged with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, data: Data) -> None:
        self._tokenizer, self._data, self._classes = tokenizer, data, Classes(data.labels or ())

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Tagged | DataError]:
        """Each row's text with its tags, or its error."""
        read = [or_error(self._read, row) for row in rows]
        texts = [" ".join(found[0]) for found in read if not isinstance(found, DataError)]
        encoded = iter(self._encoded(texts))
        return [found if isinstance(found, DataError) else _tagged(*found, *next(encoded)) for found in read]

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        """The text as a user's turn. Raises `DataError` if the row is not of this kind."""
        return [Turn("user", " ".join(self._read(row)[0]))]

    def _read(self, row: dict[str, Any]) -> tuple[list[str], list[int]]:
        words, tags = (field_of(row, name, self._data) for name in ("words", "tags"))
        if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
            raise DataError("the words are no list of texts that each have a character")
        if not isinstance(tags, list) or len(tags) != len(words):
            raise DataError(f"the tags are no list of {len(words)}, one for each word")
        text_of(" ".join(words), "text of the words")
        return words, list(map(self._classes.number, tags))

    def _encoded(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """The tokens of each text, and the characters of each token."""
        if not texts:
            return []
        found: Any = self._tokenizer(texts, return_offsets_mapping=True, truncation=False, padding=False)
        return list(zip(found["input_ids"], found["offset_mapping"], strict=True))


def _tagged(
    words: list[str], numbers: list[int], tokens: list[int], offsets: list[tuple[int, int]]
) -> Tagged | DataError:
    places = _first_tokens(words, offsets)
    if isinstance(places, DataError):
        return places
    text = np.array(tokens, np.uint32)
    tags, trained = np.zeros(len(text), np.uint32), np.zeros(len(text), np.bool_)
    wanted: dict[int, list[int]] = {}
    for place, number in zip(places, numbers, strict=True):
        wanted.setdefault(place, []).append(number)
    for place, given in wanted.items():
        if len(set(given)) == 1:
            tags[place], trained[place] = given[0], True
    untagged = sum(len(given) for place, given in wanted.items() if not trained[place])
    return Tagged(text, tags, trained, places=places, untagged=untagged)


def _first_tokens(words: list[str], offsets: list[tuple[int, int]]) -> list[int] | DataError:
    """The first token of each word. `offsets` has the characters of each token."""
    places, begin, place = list[int](), 0, 0
    for word in words:
        first = begin + len(word) - len(word.lstrip())
        begin += len(word) + 1
        while place < len(offsets) and offsets[place][1] <= first:
            place += 1
        if place == len(offsets) or offsets[place][0] >= begin - 1:
            return DataError(f"the word {word!r} has no token of its own")
        places.append(place)
    return places
