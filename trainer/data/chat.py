"""Turns a row into token ids, and decides which of them are trained.

The conversation is rendered and tokenized once, as a whole, exactly as the model will see it. Which tokens are trained
is then a question of where the assistant's turns lie in that text: a template with `{% generation %}` tags says so
itself; otherwise a turn reaches from the end of the generation prompt to the end of the turn, its end-of-turn token
included, as both are prefixes of the whole text.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.base.config_json import read_by_transformers, without_panics
from trainer.config import Data
from trainer.data.formats import missing_field
from trainer.data.left_out import left_out
from trainer.data.manifest import TARGET_BIT
from trainer.data.messages import Message, is_trained, read_messages, read_tools, text_of
from trainer.data.spans import Span, Spelling, overlapping
from trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The same expression as in transformers, which fills the mask only if it matches.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Finding a turn renders all that is before it, twice. For the turns of one row together, these are the most messages and
# characters, some five seconds' work: about 1,000 turns of which every second one is the assistant's.
_MOST_MESSAGES, _MOST_CHARACTERS = 2**19, 2**30


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


def template_text(data: Data) -> str | None:
    """The chat template that replaces the tokenizer's own, or None.

    Raises:
        ConfigError: the file cannot be read.
    """
    if data.template is None:
        return None
    try:
        return Path(data.template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.template: {data.template!r} cannot be read: {error}.") from error


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
        self._data = data
        if data.format == "chat":
            self._template = _chat_template(tokenizer, data)
            self._tagged = _GENERATION.search(self._template) is not None
            special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
            self._after_end = re.compile(f"(?:{'|'.join(map(re.escape, special)) or '(?!)'})(\\s+)\\Z")
            self._bos = self._eos = None  # the template writes them
        else:
            with read_by_transformers(tokenizer.name_or_path, "the tokenizer"):
                self._bos, self._eos = _framing(tokenizer, data)

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Example | DataError]:
        """Each row's tokens and targets, or what is wrong with it; the error's text has no place in it.

        Raises:
            ConfigError: the tokenizer breaks down.
        """
        with without_panics(self._tokenizer.name_or_path, "the tokenizer"):
            rendered = [self._render_or_error(row) for row in rows]
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

    def _render_or_error(self, row: dict[str, Any]) -> Rendered | Example | DataError:
        try:
            return self.render(row)
        except DataError as error:
            return error
        except RecursionError:
            return DataError("its values are nested too deeply")

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
        start = 0 if self._data.targets == "all" else len(prompt)
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
        targets = self._targets(encoding, tokens, document)
        if self._bos is not None and tokens[:1].tolist() != [self._bos]:
            tokens, targets = np.append(np.uint32(self._bos), tokens), np.append(False, targets)
        if self._eos is not None and tokens[-1:].tolist() != [self._eos]:
            tokens, targets = np.append(tokens, np.uint32(self._eos)), np.append(targets, document.end_trained)
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
        conversation = _Conversation(self._tokenizer, self._template, messages, tools)
        whole = conversation.render(len(messages))
        lacking = [
            *(["tools"] if tools and conversation.ignores_tools(whole) else []),
            *left_out(given, messages, whole),
        ]
        silent = [turn for turn, message in enumerate(messages) if not is_trained(message)]
        conversation.check_size(silent, whole)
        untrained = [(conversation.prefix(turn, whole), conversation.prefix(turn + 1, whole)) for turn in silent]
        if self._data.targets == "all":
            return Rendered(whole, _between(untrained, len(whole)), left_out=lacking)
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        if self._data.targets == "last_assistant":
            turns = turns[-1:]
        if self._tagged:
            if turns and self._data.targets == "last_assistant":
                untrained = [(0, conversation.prefix(turns[0], whole)), *untrained]
            return replace(conversation.tagged(untrained), left_out=lacking)
        turns = [turn for turn in turns if is_trained(messages[turn])]
        conversation.check_size([*silent, *turns], whole)
        return Rendered(whole, [self._turn(conversation, turn, whole) for turn in turns], left_out=lacking)

    def _turn(self, conversation: "_Conversation", turn: int, whole: str) -> Span:
        """Characters of the whole text that the model has to write in an assistant's turn."""
        if turn == 0:
            raise DataError(
                "turn 1 is the assistant's, so where it begins is unknown; "
                "begin with another turn, or give data.template a template with {% generation %} tags"
            )
        start = conversation.prefix(turn, whole, generation_prompt=True)
        end = conversation.prefix(turn + 1, whole)
        # Many templates put a line break after the end-of-turn token; generation has ended by then.
        match = self._after_end.search(whole, start, end)
        return start, match.start(1) if match else end


class _Conversation:
    """One conversation, whose beginnings are rendered too."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: str,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._options: dict[str, Any] = {"chat_template": template, "tools": tools}
        self._messages = messages

    def render(self, count: int, generation_prompt: bool = False) -> str:
        """The text of the first `count` messages."""
        text = self._apply(count, tokenize=False, add_generation_prompt=generation_prompt)
        return text_of(text, "conversation's text")

    def check_size(self, turns: Sequence[int], whole: str) -> None:
        """Raises `DataError` where finding these turns in the whole text would take very long."""
        messages, most = sum(2 * turn + 1 for turn in turns), _MOST_MESSAGES
        if messages > most or messages * len(whole) > _MOST_CHARACTERS * len(self._messages):
            raise DataError(
                f"{len(self._messages):,} turns of {len(whole):,} characters are too long to find {len(turns):,} of them in the "
                "text; split the conversation, give data.template a template with {% generation %} tags, or set data.loss_on: "
                "last_assistant or all"
            )

    def ignores_tools(self, whole: str) -> bool:
        """Whether the text would be the same without tools."""
        try:
            return self._apply(len(self._messages), tokenize=False, add_generation_prompt=False, tools=None) == whole
        except DataError:
            return False

    def prefix(self, count: int, whole: str, generation_prompt: bool = False) -> int:
        """Length of the text of the first `count` messages, which must begin the whole text."""
        if count == 0:
            return 0
        if count == len(self._messages):
            return len(whole)
        prefix = self.render(count, generation_prompt)
        if not whole.startswith(prefix):
            turn = count + 1 if generation_prompt else count
            raise DataError(
                f"turn {turn}: what the chat template makes of the conversation up to it is not how the whole begins, so "
                "its place is unknown; give data.template a template with {% generation %} tags, or set data.loss_on: all"
            )
        return len(prefix)

    def tagged(self, untrained: Sequence[Span]) -> Example:
        """Tokens; the targets are those that the template's tags enclose and that lie in none of the `untrained` spans."""
        encoding = self._apply(
            len(self._messages),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        offsets = np.array(encoding["offset_mapping"], np.int64).reshape(-1, 2)
        targets = np.array(encoding["assistant_masks"], bool)
        for begin, end in untrained:
            targets &= (offsets[:, 0] < begin) | (offsets[:, 1] > end)
        targets[:1] = False
        return Example(np.array(encoding["input_ids"], np.uint32), targets)

    def _apply(self, count: int, **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(self._messages[:count], **(self._options | options))
        except Exception as error:  # a template is a program of the user's: it may raise anything
            raise DataError(f"the chat template refuses the conversation: {error}") from error


def field_of(row: dict[str, Any], name: str, data: Data) -> Any:
    """The value of a field by its name here, which `data.fields` may change. Raises `DataError` where there is none."""
    called = data.fields.get(name, name)
    if called not in row:
        raise missing_field(row, name, called, data.format)
    return row[called]


def _between(spans: Sequence[Span], end: int) -> list[Span]:
    """The characters up to `end` that are in none of the spans, which are sorted."""
    borders = [0, *(border for span in spans for border in span), end]
    return list(zip(borders[::2], borders[1::2], strict=True))


def _chat_template(tokenizer: "PreTrainedTokenizerBase", data: Data) -> str:
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


def _framing(tokenizer: "PreTrainedTokenizerBase", data: Data) -> tuple[int | None, int]:
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
