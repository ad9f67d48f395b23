"""Turns a row into token ids, and decides which of them are trained.

The conversation is rendered and tokenized once, as a whole, exactly as the model will see it. Which tokens are trained
is then a question of where the assistant's turns lie in that text: a template with `{% generation %}` tags says so
itself; otherwise `conversation` finds the turns.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.base.describe.config_json import read_by_transformers, without_panics
from trainer.config import Data
from trainer.data.dataset.binary import TARGET_BIT
from trainer.data.format.formats import missing_field, or_error
from trainer.data.format.left_out import left_out
from trainer.data.format.messages import Message, is_trained, read_messages, read_tools, text_of
from trainer.data.render.conversation import Conversation
from trainer.data.render.spans import Span, Spelling, joined, overlapping, without
from trainer.data.render.template import template_text
from trainer.data.render.thinking import blocks, with_hidden_thinking, without_thinking
from trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The same expression as in transformers, which fills the mask only if it matches.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, eq=False)
class Example:
    """A tokenized document: `tokens` (n,) uint32, and `targets` (n,) bool, whether each is trained.

    The first never is: nothing predicts it. `left_out` names what the row carries and its text does not contain.
    """

    tokens: NDArray[np.uint32]
    targets: NDArray[np.bool_]
    left_out: Sequence[str] = ()

    @property
    def teaches(self) -> bool:
        """Whether anything of it is trained."""
        return bool(self.targets.any())

    def cut(self, limit: int) -> "Example":
        """Its first `limit` tokens."""
        return Example(self.tokens[:limit], self.targets[:limit], self.left_out)

    def pieces(self, limit: int) -> "list[Example]":
        """Pieces of `limit` tokens, and the rest; nothing in a piece predicts its first token."""
        pieces = [
            Example(self.tokens[start : start + limit], self.targets[start : start + limit].copy())
            for start in range(0, len(self.tokens), limit)
        ]
        for piece in pieces:
            piece.targets[:1] = False
        return pieces

    def stored(self) -> NDArray[np.uint32]:
        """The tokens as a data set holds them, (n,), with `TARGET_BIT` set on trained ones."""
        return self.tokens | self.targets * TARGET_BIT


@dataclass(frozen=True)
class Rendered:
    """A document's text, and the characters of it that are trained: `spans` are sorted and disjoint.

    `end_trained` says whether the end-of-text token is trained, which texts without a chat template get. `left_out` is as in
    `Example`.
    """

    text: str
    spans: list[Span]
    end_trained: bool = True
    left_out: Sequence[str] = ()


@dataclass(frozen=True)
class Turn:
    """One message: the role that says it and its text; `calls` says whether it has a call of a tool."""

    role: str
    content: str
    calls: bool = False


class Renderer:
    """Encodes rows of one format with one tokenizer.

    Raises:
        ConfigError: the tokenizer cannot serve the format: it is not a fast one, or lacks a chat template or an
            end-of-text token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", data: Data) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(
                "model.base: its tokenizer is not a fast one, so the place of a token in the text is unknown. "
                "Use a base with a tokenizer.json."
            )
        self._tokenizer = tokenizer
        from tokenizers import Tokenizer

        # A call of the tokenizer would switch both off too: a tokenizer.json may ask for them.
        with read_by_transformers(tokenizer.name_or_path, "the tokenizer"):
            backend: Any = tokenizer.backend_tokenizer
            self._backend: Any = Tokenizer.from_str(backend.to_str())
            self._backend.no_truncation()
            self._backend.no_padding()
            # It frames texts, which is done here, and may leave a token's white space out of its offsets.
            self._backend.post_processor = None
            self._spelling = Spelling(self._backend)
        self._data, self._wanted = data, data.wanted
        special = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = set(special)
        if data.format == "chat":
            template, ends = chat_template(tokenizer, data), "|".join(map(re.escape, special.values())) or "(?!)"
            self._conversation = partial(Conversation, tokenizer, template, re.compile(ends))
            self._tagged = _GENERATION.search(template) is not None
            self._after_end = re.compile(f"(?:{ends})(\\s+)\\Z")
            self._bos = self._eos = None  # the template writes them
        else:
            with read_by_transformers(tokenizer.name_or_path, "the tokenizer"):
                self._bos, self._eos = framing(tokenizer, data)

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Example | DataError]:
        """Each row's tokens and targets, or what is wrong with it; the error's text has no place in it.

        Raises:
            ConfigError: the tokenizer breaks down.
        """
        with without_panics(self._tokenizer.name_or_path, "the tokenizer"):
            rendered = [or_error(self.render, row) for row in rows]
            texts = [document.text for document in rendered if isinstance(document, Rendered)]
            encodings = iter(self._encodings(texts))
            return [
                self._example(next(encodings), document) if isinstance(document, Rendered) else document
                for document in rendered
            ]

    def _encodings(self, texts: list[str]) -> list[Any]:
        """The encoding of each text, or a `DataError`: one that has no token for a character may raise."""
        encode = self._backend.encode_batch_fast if self._spelling.usable else self._backend.encode_batch
        try:
            return encode(texts, add_special_tokens=False)
        except Exception as error:  # of this very type
            if len(texts) == 1:
                return [DataError(f"the tokenizer cannot encode it ({error})")]
            return [encoding for text in texts for encoding in self._encodings([text])]

    def render(self, row: dict[str, Any]) -> Rendered | Example:
        """A row's text and what of it is trained; tokens already, where a template with tags says it of them.

        Raises:
            DataError: the row lacks a field, or a value is not what the format needs.
        """
        match self._data.format:
            case "chat":
                return self._chat(self._field(row, "messages"), row.get(self._data.fields.get("tools", "tools")))
            case "prompt_completion":
                prompt, completion = (text_of(self._field(row, name), name) for name in ("prompt", "completion"))
            case _:  # text
                prompt, completion = "", text_of(self._field(row, "text"), "text")
        start = 0 if self._wanted.roles == "all" else len(prompt)
        # An empty completion is a gap in the data: it must not teach the model to say nothing.
        return Rendered(prompt + completion, [(start, len(prompt) + len(completion))], end_trained=bool(completion))

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        """The turns of a row, in any format: a completion is an assistant's turn, and so is a plain text.

        Raises:
            DataError: as `render`.
        """
        match self._data.format:
            case "chat":
                messages = read_messages(self._field(row, "messages"))
                return [Turn(message["role"], message["content"], "tool_calls" in message) for message in messages]
            case "prompt_completion":
                roles = {"prompt": "user", "completion": "assistant"}
                return [Turn(role, text_of(self._field(row, name), name)) for name, role in roles.items()]
            case _:  # text
                return [Turn("assistant", text_of(self._field(row, "text"), "text"))]

    def _field(self, row: dict[str, Any], name: str) -> Any:
        return field_of(row, name, self._data)

    def _example(self, encoding: Any, document: Rendered) -> Example | DataError:
        if isinstance(encoding, DataError):
            return encoding
        tokens = np.array(encoding.ids, np.uint32)
        targets = self._as_ends_are(tokens, self._targets(encoding, tokens, document))
        if self._bos is not None and tokens[:1].tolist() != [self._bos]:
            tokens, targets = np.append(np.uint32(self._bos), tokens), np.append(False, targets)
        if self._eos is not None and tokens[-1:].tolist() != [self._eos]:
            tokens, targets = (
                np.append(tokens, np.uint32(self._eos)),
                np.append(targets, document.end_trained and self._wanted.end),
            )
        targets[:1] = False
        return Example(tokens, targets, document.left_out)

    def _targets(self, encoding: Any, tokens: NDArray[np.uint32], document: Rendered) -> NDArray[np.bool_]:
        if self._spelling.usable:
            targets = self._spelling.overlapping(document.text, tokens, document.spans)
            if targets is not None:
                return targets
            encoding = self._backend.encode(document.text, add_special_tokens=False)
        return overlapping(encoding, document.spans)

    def _chat(self, given: Any, given_tools: Any) -> Rendered | Example:
        messages, tools = read_messages(given), read_tools(given_tools)
        if self._data.thinking == "strip":
            messages = given = [without_thinking(message) for message in messages]
        conversation = self._conversation(messages, tools)
        whole = conversation.render(len(messages))
        tagged = self._tagged
        if self._data.thinking == "keep":
            kept = with_hidden_thinking(messages, partial(self._text, tools=tools))
            if kept != messages:
                conversation = self._conversation(kept, tools)
                whole, tagged = conversation.render(len(messages)), False
        lacking = [
            *(["tools"] if tools and conversation.ignores_tools(whole) else []),
            *left_out(given, messages, whole),
        ]
        silent = [turn for turn, message in enumerate(messages) if not is_trained(message)]
        conversation.check_size(silent, whole)
        untrained = [conversation.place(turn, whole) for turn in silent]
        if not self._wanted.thinking:
            untrained = joined([*untrained, *blocks(whole)])
        if self._wanted.roles == "all":
            return Rendered(whole, without([(0, len(whole))], untrained), left_out=lacking)
        roles = self._wanted.roles or ["assistant"]
        turns = [turn for turn, message in enumerate(messages) if message["role"] in roles]
        if self._wanted.turns == "last":
            turns = turns[-1:]
        if tagged and roles == ["assistant"]:
            if turns and self._wanted.turns == "last":
                untrained = [(0, conversation.place(turns[0], whole)[0]), *untrained]
            return replace(self._tagged_example(conversation, untrained), left_out=lacking)
        turns = [turn for turn in turns if is_trained(messages[turn])]
        conversation.check_size([*silent, *turns], whole)
        spans = [self._turn(conversation, messages[turn], turn, whole) for turn in turns]
        # Where no thinking is left out, no span is touched.
        return Rendered(whole, spans if self._wanted.thinking else without(spans, untrained), left_out=lacking)

    def _text(self, messages: list[Message], tools: list[dict[str, Any]] | None) -> str:
        return self._conversation(messages, tools).render(len(messages))

    def _turn(self, conversation: Conversation, message: Message, turn: int, whole: str) -> Span:
        """The characters of a turn that are trained."""
        find = conversation.written if message["role"] == "assistant" else conversation.said
        start, end = find(turn, whole)
        # Many templates put a line break after the end-of-turn token; generation has ended by then.
        match = self._after_end.search(whole, start, end)
        return start, match.start(1) if match else end

    def _tagged_example(self, conversation: Conversation, untrained: Sequence[Span]) -> Example:
        """The targets are what the template's tags enclose and what lies in none of the `untrained` spans."""
        encoding = conversation.tagged()
        offsets = np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2)
        tokens, targets = np.array(encoding["input_ids"], np.uint32), np.array(encoding["assistant_masks"], bool)
        for begin, end in untrained:
            targets &= (offsets[:, 0] < begin) | (offsets[:, 1] > end)
        targets[:1] = False
        return Example(tokens, self._as_ends_are(tokens, targets))

    def _as_ends_are(self, tokens: NDArray[np.uint32], targets: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """The targets without the special token that ends each run of them, and white space behind it, where ends are not trained."""
        if self._wanted.end:
            return targets
        kept = targets.copy()
        for last in np.flatnonzero(targets & ~np.append(targets[1:], False)).tolist():
            first = last
            while first and targets[first - 1] and self._is_space(tokens[first]):
                first -= 1
            if tokens[first] in self._special:
                kept[first : last + 1] = False
        return kept

    def _is_space(self, token: np.uint32) -> bool:
        text: Any = self._tokenizer.decode([int(token)])
        return text.isspace()


def field_of(row: dict[str, Any], name: str, data: Data) -> Any:
    """The value of a field by its name here, which `data.fields` may change. Raises `DataError` where there is none."""
    called = data.fields.get(name, name)
    if called not in row:
        raise missing_field(row, name, called, data.format)
    return row[called]


def chat_template(tokenizer: "PreTrainedTokenizerBase", data: Data) -> str:
    own = template_text(data)
    if own is not None:
        return own
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise ConfigError(
            "data.template: not set, and the tokenizer of model.base has no chat template. Set it to a Jinja chat "
            "template file, or data.format to prompt_completion or text."
        ) from error


def framing(tokenizer: "PreTrainedTokenizerBase", data: Data) -> tuple[int | None, int]:
    """The begin token, where the tokenizer itself puts one before a text, and the end token."""
    eos: Any = tokenizer.eos_token_id
    if eos is None:
        raise ConfigError(
            f"data.format: {data.format} ends each document with the tokenizer's eos_token, and the tokenizer of "
            "model.base has none. Set eos_token in its tokenizer_config.json."
        )
    bos: Any = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return bos if adds_bos else None, eos
