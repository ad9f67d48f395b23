"""Finds the tokens of a text that lie in given spans of its characters.

A token across the border of a span counts: "A: " + "yes" may be tokenized as "A", ":", " yes".
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.format.spans import Span

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SAMPLE = "one two"


class Spelling:
    """Finds tokens by the bytes that each stands for, in a byte-level tokenizer (those of Llama 3, Qwen, GPT-2, ...).

    A tokenizer that records offsets, as the function `overlapping` needs, takes a quarter longer. The result is
    verified: it is used only if the bytes of the tokens, end to end, equal those of the text.
    """

    def __init__(self, backend: "Tokenizer") -> None:
        vocabulary = backend.get_vocab(with_added_tokens=True)
        added = {number: token.content for number, token in backend.get_added_tokens_decoder().items()}
        alphabet = _alphabet()
        self._bytes = [b""] * (max(vocabulary.values(), default=-1) + 1)
        for token, number in vocabulary.items():
            if number not in added and alphabet.keys() >= set(token):
                self._bytes[number] = bytes(map(alphabet.__getitem__, token))
        for number, content in added.items():
            self._bytes[number] = content.encode()
        self._sizes = np.array([len(spelled) for spelled in self._bytes], np.int64)
        ids = np.array(backend.encode(_SAMPLE, add_special_tokens=False).ids, np.uint32)
        self.usable = vocabulary.keys() >= alphabet.keys() and self.overlapping(_SAMPLE, ids, ()) is not None
        """Whether the tokenizer is a byte-level one at all."""

    def overlapping(self, text: str, tokens: NDArray[np.uint32], spans: Sequence[Span]) -> NDArray[np.bool_] | None:
        """Which of `tokens` share a character with a span, (tokens,).

        None if the tokens do not spell the text, because the tokenizer normalizes it or drops white space.
        """
        if b"".join(map(self._bytes.__getitem__, tokens.tolist())) != text.encode():
            return None
        ends = np.cumsum(self._sizes[tokens])
        targets = np.zeros(len(tokens), bool)
        for start, end in spans:
            if start < end:
                begins, stops = (len(text[:place].encode()) for place in (start, end))
                targets[np.searchsorted(ends, begins, "right") : np.searchsorted(ends, stops, "left") + 1] = True
        return targets


def overlapping(encoding: Any, spans: Sequence[Span]) -> NDArray[np.bool_]:
    """Which tokens of a `tokenizers.Encoding` with offsets share a character with a span, (tokens,).

    Looks up only the tokens at the borders, because making the list of all offsets takes half as long as tokenizing.
    """
    targets = np.zeros(len(encoding), bool)
    for start, end in spans:
        first = _token_at(encoding, range(start, end))
        last = _token_at(encoding, range(end - 1, start - 1, -1))
        if first is not None and last is not None:
            # One character may be several tokens. Only the first of them was found above.
            while last + 1 < len(targets) and encoding.token_to_chars(last + 1)[0] < end:
                last += 1
            targets[first : last + 1] = True
    return targets


def _token_at(encoding: Any, characters: Iterable[int]) -> int | None:
    """The first token of the first of these characters that is in any token. A tokenizer may drop white space."""
    found = (encoding.char_to_token(character) for character in characters)
    return next((token for token in found if token is not None), None)


def _alphabet() -> dict[str, int]:
    """The character that stands for each byte in a byte-level vocabulary.

    It is the byte's own character if that is printable, else one from U+0100 on. Source: `bytes_to_unicode` in GPT-2's
    encoder.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
