"""Turns a row of words with tags into a document: the text's tokens, and behind them a number for each token. The number of a word's
first token is its tag, and is trained; no other is.

The text is the words with a space between them, as the tokenizer frames it. The numbers are a segment of their own, which no model reads.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.base.tokenizer import Tokenizer
from trainer.config import Data
from trainer.data.dataset.binary import MISMATCHED_BIT
from trainer.data.format.formats import or_error
from trainer.data.render.chat import Turn, field_of
from trainer.data.render.classified import Numbered, number_of
from trainer.errors import DataError


class Tagged(Numbered):
    """A text and the number of each token's tag, of which those are trained that begin a word."""

    @property
    def teaches(self) -> bool:
        """Whether any token has a tag."""
        return bool(self.trained.any())

    def cut(self, limit: int) -> "Tagged":
        """The beginning of the text, with its tags at most `limit` tokens."""
        kept = limit // 2
        return Tagged(self.text[:kept], self.numbers[:kept], self.trained[:kept])

    def stored(self) -> NDArray[np.uint32]:
        """The tokens as a data set holds them; the numbers are a segment of their own."""
        stored = super().stored()
        stored[len(self.text)] |= MISMATCHED_BIT
        return stored


class TaggedRenderer:
    """Encodes rows of the kind tagged with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, data: Data) -> None:
        self._tokenizer, self._data = tokenizer, data
        self._numbers = {name: number for number, name in enumerate(data.labels or ())}

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Tagged | DataError]:
        """Each row's text with its tags, or what is wrong with it."""
        read = [or_error(self._read, row) for row in rows]
        texts = [" ".join(found[0]) for found in read if not isinstance(found, DataError)]
        encoded = iter(self._encoded(texts))
        return [found if isinstance(found, DataError) else _tagged(*found, *next(encoded)) for found in read]

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        """The text as a user's turn. Raises `DataError` where the row is none of this kind."""
        return [Turn("user", " ".join(self._read(row)[0]))]

    def _read(self, row: dict[str, Any]) -> tuple[list[str], list[int]]:
        words, tags = (field_of(row, name, self._data) for name in ("words", "tags"))
        if not isinstance(words, list) or not all(isinstance(word, str) and word.strip() for word in words):
            raise DataError("the words are no list of texts that each have a character")
        if not isinstance(tags, list) or len(tags) != len(words):
            raise DataError(f"the tags are no list of {len(words)}, one for each word")
        return words, [number_of(tag, self._numbers) for tag in tags]

    def _encoded(self, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """The tokens of each text, and the characters that each of them stands for."""
        if not texts:
            return []
        found: Any = self._tokenizer(texts, return_offsets_mapping=True, truncation=False, padding=False)
        return list(zip(found["input_ids"], found["offset_mapping"], strict=True))


def _tagged(
    words: list[str], numbers: list[int], tokens: list[int], offsets: list[tuple[int, int]]
) -> Tagged | DataError:
    text = np.array(tokens, np.uint32)
    tags, has_tag = np.zeros(len(text), np.uint32), np.zeros(len(text), np.bool_)
    begin, place = 0, 0
    for word, number in zip(words, numbers, strict=True):
        first = begin + len(word) - len(word.lstrip())
        while place < len(offsets) and offsets[place][1] <= first:
            place += 1
        if place == len(offsets):
            return DataError(f"the word {word!r} has no token of its own")
        tags[place], has_tag[place] = number, True
        begin += len(word) + 1
    return Tagged(text, tags, has_tag)
