"""Turns a row into token ids, and decides which of them are trained.

The document is rendered and tokenized once, as a whole, exactly as the model will see it. The trained tokens follow
from the trained characters, which `chat_text` finds in a conversation. A token across the border of trained characters
is trained: "A: " + "yes" may be tokenized as "A", ":", " yes".
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from trainer.base.base import Tokenizer
from trainer.base.unreadable import read_by_transformers, without_panics
from trainer.config import Data
from trainer.data.dataset.dataset import TARGET_BIT
from trainer.data.dataset.pictures import NO_PICTURES, apart, columns_of, cut_before, cut_behind
from trainer.data.format.formats import missing_field, or_error
from trainer.data.format.messages import Message, read_messages, text_of, with_default_system, without_system
from trainer.data.format.spans import Span, joined
from trainer.data.render.chat_text import ChatText, Rendered
from trainer.data.render.document import Document, Turn
from trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


@dataclass(frozen=True, eq=False)
class Example(Document):
    """A tokenized text. `places` has an entry of `PICTURE` for each picture in it, in their order, and `together` says
    whether the tokens of one depend on the others."""

    tokens: NDArray[np.uint32]
    targets: NDArray[np.bool_]
    left_out: Sequence[str] = ()
    places: NDArray[np.void] = field(default_factory=lambda: NO_PICTURES)
    together: Callable[[], bool] = apart

    @property
    def columns(self) -> Mapping[str, Any]:
        return columns_of(self.places)

    def cut(self, limit: int) -> Self:
        """Its first tokens, at most `limit`. A picture that does not fit ends the text before itself."""
        limit, places = cut_before(self.places, limit, self.together)
        return replace(self, tokens=self.tokens[:limit], targets=self.targets[:limit], places=places)

    def without(self, cut: int) -> Self:
        """The text without its first tokens: `cut` of them, or more where the cut lies in a picture."""
        cut, places = cut_behind(self.places, cut, self.together)
        return replace(self, tokens=self.tokens[cut:], targets=self.targets[cut:], places=places)

    def pieces(self, limit: int) -> list[Self]:
        """Pieces of `limit` tokens, and a shorter last one. Nothing predicts the first token of a piece."""
        pieces = [
            replace(self, tokens=self.tokens[start : start + limit], targets=self.targets[start : start + limit].copy())
            for start in range(0, len(self.tokens), limit)
        ]
        for piece in pieces:
            piece.targets[:1] = False
        return pieces

    def stored(self) -> NDArray[np.uint32]:
        """The tokens as a data set holds them, (n,), with `TARGET_BIT` set on trained ones."""
        return self.tokens | self.targets * TARGET_BIT


class Renderer:
    """Encodes rows of one format with one tokenizer.

    Texts without a chat template get an end token, from which a model learns to stop, unless `ends` is False. The
    tokenizer's own framing stays.

    Raises:
        ConfigError: the tokenizer cannot serve the format: it is not a fast one, or lacks a chat template or an
            end-of-text token.
    """

    def __init__(self, tokenizer: Tokenizer, data: Data, *, ends: bool = True) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                "model.base: its tokenizer is not a fast one, so the place of a token in the text is unknown. "
                "Use a base with a tokenizer.json."
            )
        self._tokenizer = tokenizer
        from tokenizers import Tokenizer as Backend

        # Switch truncation and padding off, as a call of the tokenizer would: a tokenizer.json may ask for them.
        with read_by_transformers(tokenizer.name_or_path, "the tokenizer"):
            backend: Any = tokenizer.backend_tokenizer
            self._backend: Any = Backend.from_str(backend.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
            # The post-processor frames texts, which is done here, and may leave white space out of a token's offsets.
            self._backend.post_processor = None
            self._spelling = Spelling(self._backend)
        self._data, self._wanted = data, data.wanted
        added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        if data.format == "chat":
            self._chat = ChatText(tokenizer, data, added, special)
            special = self._chat.special
            self._bos = self._eos = None  # the template writes them
        elif data.format == "segments":
            self._bos = self._eos = None  # the author of the segments wrote them
        else:
            with read_by_transformers(tokenizer.name_or_path, "the tokenizer"):
                self._bos, eos = framing(tokenizer, data)
                self._eos = eos if ends or _encoded(tokenizer, "a")[-1:] == [eos] else None
        self._special = special

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Example | DataError]:
        """Each row's tokens and targets, or its error. The error's text does not name the row's place.

        Raises:
            ConfigError: the tokenizer fails.
        """
        with without_panics(self._tokenizer.name_or_path, "the tokenizer"):
            if self._data.tokenize_apart:
                return self._encode_apart(rows)
            return self.encode_rendered([or_error(self.render, row) for row in rows])

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """The characters that each token of a text stands for, without a token that begins or ends every text."""
        return self._backend.encode(text, add_special_tokens=False).offsets

    def encode_rendered(self, rendered: Sequence[Rendered | DataError]) -> list[Example | DataError]:
        """The tokens and targets of texts that are rendered already."""
        texts = [document.text for document in rendered if isinstance(document, Rendered)]
        encodings = iter(self._encodings(texts))
        return [
            document if isinstance(document, DataError) else self._example(next(encodings), document)
            for document in rendered
        ]

    def _encode_apart(self, rows: Sequence[dict[str, Any]]) -> list[Example | DataError]:
        """As `encode`, with each part of a row tokenized by itself."""
        everything = self._wanted.roles == "all"
        read = [or_error(self._parts, row) for row in rows]
        encodings = iter(self._encodings([text for parts in read if isinstance(parts, list) for text, _ in parts]))
        examples = list[Example | DataError]()
        for parts in read:
            if isinstance(parts, DataError):
                examples.append(parts)
                continue
            own = [(next(encodings), trained or everything) for _, trained in parts]
            if failed := next((encoding for encoding, _ in own if isinstance(encoding, DataError)), None):
                examples.append(failed)
                continue
            tokens = np.concatenate([np.array(encoding.ids, np.uint32) for encoding, _ in own])
            targets = np.concatenate([np.full(len(encoding.ids), trained) for encoding, trained in own])
            examples.append(self._framed(tokens, targets, end_trained=bool(parts[-1][0]), left_out=()))
        return examples

    def _encodings(self, texts: list[str]) -> list[Any]:
        """The encoding of each text, or a `DataError`. A tokenizer may raise if it has no token for a character."""
        encode = self._backend.encode_batch_fast if self._spelling.usable else self._backend.encode_batch
        try:
            return encode(texts, add_special_tokens=False)
        except Exception as error:  # of this very type
            if len(texts) == 1:
                return [DataError(f"the tokenizer cannot encode it ({error})")]
            return [encoding for text in texts for encoding in self._encodings([text])]

    def render(self, row: dict[str, Any]) -> Rendered:
        """A row's text and its trained characters.

        Raises:
            DataError: the row lacks a field, or a value is not what the format needs.
        """
        if self._data.format == "chat":
            return self._chat.render(self._field(row, "messages"), tools_of(row, self._data))
        parts, everything = self._parts(row), self._wanted.roles == "all"
        ends = accumulate(len(text) for text, _ in parts)
        spans = [
            (end - len(text), end)
            for end, (text, answers) in zip(ends, parts, strict=True)
            if text and (answers or everything)
        ]
        # An empty completion is a gap in the data. The model must not learn from it to say nothing.
        return Rendered("".join(text for text, _ in parts), joined(spans), end_trained=bool(parts[-1][0]))

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        """The turns of a row of any format. A completion or a plain text is an assistant's turn.

        Raises:
            DataError: as `render`.
        """
        if self._data.format == "chat":
            messages = read_messages(self._field(row, "messages"))
            messages = without_system(messages) if self._data.drop_system else messages
            return turns_of(with_default_system(messages, self._data.system))
        return [Turn("assistant" if answers else "user", text) for text, answers in self._parts(row)]

    def _parts(self, row: dict[str, Any]) -> list[tuple[str, bool]]:
        """The texts of a row without a template, end to end, and whether each is an answer, which is always trained."""
        match self._data.format:
            case "segments":
                return _segments(self._field(row, "segments"))
            case "prompt_completion":
                names = ("prompt", "completion")
                return [(text_of(self._field(row, name), name), name == "completion") for name in names]
            case _:  # text
                return [(text_of(self._field(row, "text"), "text"), True)]

    def _field(self, row: dict[str, Any], name: str) -> Any:
        return field_of(row, name, self._data)

    def _example(self, encoding: Any, document: Rendered) -> Example | DataError:
        if isinstance(encoding, DataError):
            return encoding
        tokens = np.array(encoding.ids, np.uint32)
        targets = self._targets(encoding, tokens, document)
        return self._framed(tokens, targets, document.end_trained, document.left_out)

    def _framed(
        self, tokens: NDArray[np.uint32], targets: NDArray[np.bool_], end_trained: bool, left_out: Sequence[str]
    ) -> Example:
        """The example of a text's tokens, with the tokens that begin and end a text."""
        targets = self._as_ends_are(tokens, targets)
        if self._bos is not None and tokens[:1].tolist() != [self._bos]:
            tokens, targets = np.append(np.uint32(self._bos), tokens), np.append(False, targets)
        if self._eos is not None and tokens[-1:].tolist() != [self._eos]:
            tokens, targets = (
                np.append(tokens, np.uint32(self._eos)),
                np.append(targets, end_trained and bool(self._wanted.end)),
            )
        targets[:1] = False
        return Example(tokens, targets, left_out)

    def _targets(self, encoding: Any, tokens: NDArray[np.uint32], document: Rendered) -> NDArray[np.bool_]:
        if self._spelling.usable:
            targets = self._spelling.overlapping(document.text, tokens, document.spans)
            if targets is not None:
                return targets
            encoding = self._backend.encode(document.text, add_special_tokens=False)
        return overlapping(encoding, document.spans)

    def _as_ends_are(self, tokens: NDArray[np.uint32], targets: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The targets, without the special token at the end of those runs of targets whose ends are not trained.

        White space after that token is removed too.
        """
        if self._wanted.end is True:
            return targets
        kept, ends = targets.copy(), np.flatnonzero(targets & ~np.append(targets[1:], False)).tolist()
        for last in ends[:-1] if self._wanted.end == "last" else ends:
            first = last
            while first and targets[first - 1] and self._is_space(tokens[first]):
                first -= 1
            if tokens[first] in self._special:
                kept[first : last + 1] = False
        return kept

    def _is_space(self, token: np.uint32) -> bool:
        text: Any = self._tokenizer.decode([int(token)])
        return text.isspace()


def _segments(given: Any) -> list[tuple[str, bool]]:
    """The texts of segments, and whether each is trained. Raises `DataError` if `given` is not a list of segments."""
    if not isinstance(given, list) or not given:
        raise DataError("the segments are no list with at least one segment")
    for number, part in enumerate(given, 1):
        if not isinstance(part, dict) or not isinstance(part.get("label"), bool):
            raise DataError(f"segment {number} is no object with text and label, which is true where it is trained")
    return [
        (text_of(part.get("text"), f"text of segment {number}"), part["label"]) for number, part in enumerate(given, 1)
    ]


def field_of(row: dict[str, Any], name: str, data: Data) -> Any:
    """The value of a field, whose name `data.fields` may change. Raises `DataError` if the row lacks it."""
    called = data.fields.get(name, name)
    if called not in row:
        raise missing_field(row, name, called, data.format)
    return row[called]


def tools_of(row: dict[str, Any], data: Data) -> Any:
    """The tools of a row, if it has any."""
    return row.get(data.fields.get("tools", "tools"))


def turns_of(messages: Iterable[Message]) -> list[Turn]:
    return [Turn(message["role"], message["content"], "tool_calls" in message) for message in messages]


def framing(tokenizer: Tokenizer, data: Data) -> tuple[int | None, int]:
    """The begin token, if the tokenizer itself puts one before a text, and the end token."""
    eos: Any = tokenizer.eos_token_id
    if eos is None:
        raise ConfigError(
            f"data.format: {data.format} ends each document with the tokenizer's eos_token, and the tokenizer of "
            "model.base has none. Set eos_token in its tokenizer_config.json."
        )
    bos: Any = tokenizer.bos_token_id
    adds_bos = bos is not None and _encoded(tokenizer, "a")[:1] == [bos]
    return bos if adds_bos else None, eos


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: Any = tokenizer(text)["input_ids"]
    return ids


_SAMPLE = "one two"


class Spelling:
    """Finds tokens by the bytes that each stands for, in a byte-level tokenizer (those of Llama 3, Qwen, GPT-2, ...).

    A tokenizer that records offsets, as the function `overlapping` needs, takes a quarter longer. The result is
    verified: it is used only if the bytes of the tokens, end to end, equal those of the text.
    """

    def __init__(self, backend: "Backend") -> None:
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
