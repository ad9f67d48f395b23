"""Turns a row into token ids, and decides which of them are trained.

The conversation is rendered and tokenized once, as a whole, exactly as the model will see it. Which tokens are trained
is then a question of where the assistant's turns lie in that text: a template with `{% generation %}` tags says so
itself; otherwise a turn reaches from the end of the generation prompt to the end of the turn, its end-of-turn token
included, as both are prefixes of the whole text.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from trainer.config import Data
from trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system"}
# The same expression as in transformers, which fills the mask only if it matches.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]
Message = dict[str, Any]


@dataclass(frozen=True)
class Example:
    """A tokenized document: `targets[i]` says that token i is trained. The first never is: nothing predicts it."""

    tokens: list[int]
    targets: list[bool]


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
        self._data = data
        if data.format == "chat":
            self._template = _chat_template(tokenizer, data)
            self._tagged = _GENERATION.search(self._template) is not None
            special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
            self._after_end = re.compile(f"(?:{'|'.join(map(re.escape, special)) or '(?!)'})(\\s+)\\Z")
        else:
            self._bos, self._eos = _framing(tokenizer, data)

    def encode(self, row: dict[str, Any]) -> Example:
        """Tokens and targets of one row.

        Raises:
            DataError: the row lacks a field, or a value is not what the format needs. The message has no place in it.
        """
        match self._data.format:
            case "chat":
                return self._chat(_messages(self._field(row, "messages")))
            case "prompt_completion":
                prompt, completion = (_text(self._field(row, name), name) for name in ("prompt", "completion"))
                return self._plain(prompt, completion)
            case "text":
                return self._plain("", _text(self._field(row, "text"), "text"))

    def _field(self, row: dict[str, Any], name: str) -> Any:
        name = self._data.fields.get(name, name)
        if name not in row:
            raise DataError(f"no field {name!r} (the row has: {', '.join(row) or 'none'}); data.fields renames fields")
        return row[name]

    def _plain(self, prompt: str, completion: str) -> Example:
        encoding = self._tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)
        tokens: list[int] = encoding["input_ids"]
        span = (0 if self._data.targets == "all" else len(prompt), len(prompt) + len(completion))
        targets = _overlapping(encoding["offset_mapping"], [span])
        if self._bos is not None and tokens[:1] != [self._bos]:
            tokens, targets = [self._bos, *tokens], [False, *targets]
        if tokens[-1:] != [self._eos]:
            # An empty completion is a gap in the data: it must not teach the model to say nothing.
            tokens, targets = [*tokens, self._eos], [*targets, bool(completion)]
        return _example(tokens, targets)

    def _chat(self, messages: list[Message]) -> Example:
        if self._data.targets != "all" and self._tagged:
            return self._tagged_chat(messages)
        whole = self._render(messages)
        # The template writes the special tokens itself: adding them here would double the first.
        encoding = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        if self._data.targets == "all":
            spans = [(0, len(whole))]
        else:
            spans = [self._turn(messages, turn, whole) for turn in self._trained(messages)]
        return _example(encoding["input_ids"], _overlapping(encoding["offset_mapping"], spans))

    def _tagged_chat(self, messages: list[Message]) -> Example:
        encoding: Any = self._apply(
            messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        targets = [bool(flag) for flag in encoding["assistant_masks"]]
        trained = self._trained(messages)
        if self._data.targets == "last_assistant" and trained and trained[0] > 0:
            start = self._prefix(messages, trained[0], self._render(messages), generation_prompt=False)
            ends = (end for _, end in encoding["offset_mapping"])
            targets = [target and end > start for target, end in zip(targets, ends, strict=True)]
        return _example(encoding["input_ids"], targets)

    def _trained(self, messages: list[Message]) -> list[int]:
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        return turns[-1:] if self._data.targets == "last_assistant" else turns

    def _turn(self, messages: list[Message], turn: int, whole: str) -> Span:
        """Characters of the whole text that the model has to write in an assistant's turn."""
        if turn == 0:
            raise DataError(
                "turn 1 is the assistant's, so where it begins is unknown; "
                "begin with another turn, or give data.template a template with {% generation %} tags"
            )
        start = self._prefix(messages, turn, whole, generation_prompt=True)
        end = self._prefix(messages, turn + 1, whole, generation_prompt=False)
        # Many templates put a line break after the end-of-turn token; generation has ended by then.
        match = self._after_end.search(whole[start:end])
        return start, start + match.start(1) if match else end

    def _prefix(self, messages: list[Message], count: int, whole: str, generation_prompt: bool) -> int:
        """Length of the text of the first `count` messages, which must begin the whole text."""
        prefix = self._render(messages[:count], generation_prompt)
        if not whole.startswith(prefix):
            turn = count + 1 if generation_prompt else count
            raise DataError(
                f"turn {turn}: what the chat template makes of the conversation up to it is not how the whole begins, so "
                "its place is unknown; give data.template a template with {% generation %} tags, or set data.loss_on: all"
            )
        return len(prefix)

    def _render(self, messages: list[Message], generation_prompt: bool = False) -> str:
        return self._apply(messages, tokenize=False, add_generation_prompt=generation_prompt)

    def _apply(self, messages: list[Message], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(messages, chat_template=self._template, **options)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template refuses the conversation: {error}") from error


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


def _example(tokens: list[int], targets: list[bool]) -> Example:
    return Example(tokens, [False, *targets[1:]] if targets else targets)


def _overlapping(offsets: Iterable[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens share a character with a span. `spans` are sorted and disjoint.

    A token across the border counts: "A: " + "yes" may be tokenized as "A", ":", " yes".
    """
    targets, index = [], 0
    for start, end in offsets:
        while index < len(spans) and spans[index][1] <= start:
            index += 1
        targets.append(index < len(spans) and spans[index][0] < end and start < end)
    return targets


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise DataError(f"the messages are {_kind(value)}, and not a list with at least one message")
    return [_message(message, turn) for turn, message in enumerate(value, 1)]


def _message(message: Any, turn: int) -> Message:
    """One message as {role, content} and whatever else the template may use, from OpenAI's or ShareGPT's form."""
    if not isinstance(message, dict):
        raise DataError(f"turn {turn} is {_kind(message)}, and not an object with role and content")
    if message.get("from") is not None and message.get("role") is None:
        given, content, rest = message["from"], message.get("value"), {}
        role, names = _SHAREGPT.get(given) if isinstance(given, str) else None, tuple(_SHAREGPT)
    else:
        given, content = message.get("role"), message.get("content")
        rest = {key: value for key, value in message.items() if value is not None}
        role, names = given, _ROLES
    if role not in _ROLES:
        raise DataError(f"turn {turn} has the role {given!r}; allowed are {', '.join(names)}")
    return {**rest, "role": role, "content": _text(content, f"content of turn {turn}")}


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"the {name} is {_kind(value)}, and not a string")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"the {name} has half of a surrogate pair in it, which is no character")
    return value


def _kind(value: Any) -> str:
    return {"NoneType": "null", "list": "an empty list" if not value else "a list", "dict": "an object"}.get(
        type(value).__name__, f"of type {type(value).__name__}"
    )
