"""Turns a row into token ids, and decides which of them are trained.

The conversation is rendered and tokenized once, as a whole, exactly as the model will see it. Which tokens are trained
is then a question of where the assistant's turns lie in that text: a template with `{% generation %}` tags says so
itself; otherwise `conversation` finds the turns. Where thinking is kept or stripped, the text is that of the template with
some edits (`thinking`), and places in it are moved with them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.base.describe.config_json import read_by_transformers, without_panics
from trainer.base.find.locate import NAMED_TEMPLATES
from trainer.config import Data
from trainer.data.dataset.binary import TARGET_BIT
from trainer.data.format.formats import missing_field, or_error
from trainer.data.format.left_out import END_OF_TURN, left_out
from trainer.data.format.messages import Message, is_trained, read_messages, read_tools, text_of
from trainer.data.format.spans import Span, joined, without
from trainer.data.render.conversation import Conversation
from trainer.data.render.spelling import Spelling, overlapping
from trainer.data.render.template import conversation_template, template_for_tools
from trainer.data.render.thinking import (
    Edit,
    ThinkingForm,
    block_around,
    blocks,
    edited,
    emptied,
    kept,
    moved,
    moved_place,
    thought_of,
    with_thought,
    without_thinking,
)
from trainer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for a thought. No tokenizer or template knows this character of the private use area.
_MARK = "\ue0f2"
_LONGEST_END = 128  # characters of a token that ends a turn, with white space behind it


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
    """Encodes rows of one format with one tokenizer. Texts without a chat template get an end token, from which a model learns to stop,
    unless it is not to say that they end (`ends`); the tokenizer's own framing stays.

    Raises:
        ConfigError: the tokenizer cannot serve the format: it is not a fast one, or lacks a chat template or an
            end-of-text token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", data: Data, *, ends: bool = True) -> None:
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
        added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        if data.format == "chat":
            self._template = conversation_template(tokenizer, data)
            self._for_tools = template_for_tools(tokenizer, data)
            # A token that a run adds is special to no tokenizer, and may still be that which ends a turn.
            special |= {number for number, token in added.items() if token and self._template.end.startswith(token)}
            self._ends = _any_of(added[number] for number in special)
            self._after_end = re.compile(f"(?:{self._ends.pattern})(\\s+)\\Z")
            self._ended = re.compile(f"(?:{_any_of(added.values()).pattern})\\s*\\Z")
            self._bos = self._eos = None  # the template writes them
        else:
            with read_by_transformers(tokenizer.name_or_path, "the tokenizer"):
                self._bos, eos = framing(tokenizer, data)
                self._eos = eos if ends or _encoded(tokenizer, "a")[-1:] == [eos] else None
        self._special = special

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
                document if isinstance(document, DataError) else self._example(next(encodings), document)
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

    def render(self, row: dict[str, Any]) -> Rendered:
        """A row's text and what of it is trained.

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

    def _chat(self, given: Any, given_tools: Any) -> Rendered:
        messages, tools = read_messages(given), read_tools(given_tools)
        if tools and self._for_tools:
            raise DataError(
                f"its tools would be rendered by the tokenizer's template {self._for_tools} wherever the model is used, and conversations are "
                f"trained by the default one; set data.template to a file with that template, {NAMED_TEMPLATES}/{self._for_tools}.jinja of the base"
            )
        if self._data.thinking == "strip":
            messages = given = [without_thinking(message) for message in messages]
        if self._data.thinking == "keep":
            messages = [self._as_kept(message) for message in messages]
        talk = Conversation(self._template, self._ends, messages, tools)
        whole = talk.render(len(messages))
        turns = self._trained_turns(messages)
        _check_shown(talk, [turn for turn in turns if messages[turn]["role"] == "assistant"], whole)
        edits = self._edits(talk, messages, whole)
        text = edited(whole, list(edits.values()))
        spans, ended = self._spans(talk, messages, turns, whole, edits)
        untrained = [span for turn in range(len(messages)) for span in talk.silent(turn, whole)]
        untrained = [moved(span, list(edits.values())) for span in untrained]
        if not self._wanted.thinking:
            untrained += self._blocks(talk, messages, whole, edits)
        lacking = [
            *(["tools"] if tools and talk.ignores_tools(whole) else []),
            *left_out(given, messages, text),
            *([] if ended or not self._wanted.end else [f"{END_OF_TURN} {self._next_tag}".strip()]),
        ]
        return Rendered(text, without(joined(spans), joined(untrained)), left_out=lacking)

    @cached_property
    def _next_tag(self) -> str:
        """The token by which the template begins a question behind an answer; empty where it begins otherwise."""
        match = re.match(rf"\s*({self._ends.pattern})", self._template.behind_an_answer)
        return match[1] if match else ""

    def _as_kept(self, message: Message) -> Message:
        form = self._form(message)
        return form.given(message) if form else message

    def _form(self, message: Message) -> ThinkingForm | None:
        """How the template writes the thinking of a turn such as this one."""
        return self._template.thinking(calls="tool_calls" in message and not message["content"].strip())

    def _trained_turns(self, messages: list[Message]) -> list[int]:
        """The turns of which anything is trained, by their roles, or as their rows ask for it."""
        roles = self._wanted.roles or ["assistant"]
        turns = [turn for turn, message in enumerate(messages) if roles == "all" or message["role"] in roles]
        turns = turns[-1:] if self._wanted.turns == "last" else turns
        asked = [turn for turn, message in enumerate(messages) if message.get("train")]
        return sorted(turn for turn in {*turns, *asked} if is_trained(messages[turn]))

    def _edits(self, talk: Conversation, messages: list[Message], whole: str) -> dict[int, Edit]:
        """By turn, what `data.thinking` changes of the text that the template makes."""
        if self._data.thinking == "as_template":
            return {}
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        if self._data.thinking == "strip":
            forms = {turn: form for turn in turns if (form := self._form(messages[turn])) and form.empty != form.bare}
            places = {turn: talk.anchor(turn, whole) for turn in forms}
            found = {turn: emptied(forms[turn], whole, place) for turn, place in places.items() if place is not None}
            return {turn: edit for turn, edit in found.items() if edit}
        dropped = self._dropped(talk, messages)
        return {turn: self._kept(talk, messages[turn], turn, whole) for turn in dropped}

    def _dropped(self, talk: Conversation, messages: list[Message]) -> list[int]:
        """The turns whose thinking the template leaves out. A thought's words may stand in an answer too, so a mark takes its place."""
        marks = {turn: f"{_MARK}{turn}{_MARK}" for turn, message in enumerate(messages) if thought_of(message)}
        if not marks:
            return []
        text = talk.with_all({turn: with_thought(messages[turn], mark) for turn, mark in marks.items()})
        return [turn for turn, mark in marks.items() if mark not in text]

    def _kept(self, talk: Conversation, message: Message, turn: int, whole: str) -> Edit:
        form, place = self._form(message), talk.anchor(turn, whole)
        edit = None
        if form and not form.as_content and place is not None:
            edit = kept(form, whole, place, thought_of(message) or "")
        if edit is None:
            raise DataError(
                f"turn {turn + 1}: the chat template leaves out its thinking and shows no form for it, so it cannot be kept; set "
                "data.thinking to as_template or strip, or data.template to a template that writes it"
            )
        return edit

    def _spans(
        self, talk: Conversation, messages: list[Message], turns: Sequence[int], whole: str, edits: Mapping[int, Edit]
    ) -> tuple[list[Span], bool]:
        """The spans that are trained in the edited text, and whether an end is trained in each of the assistant's turns."""
        everything, wanted = list(edits.values()), self._wanted
        text = edited(whole, everything)
        if wanted.roles == "all":
            silent = [turn for turn, message in enumerate(messages) if not is_trained(message)]
            talk.check_size(silent, whole)
            kept_out = [moved(span, everything) for turn in silent for span in talk.place(turn, whole)]
            return without([(0, len(text))], joined(kept_out)), True
        spans, ended, found = list[Span](), True, turns
        if self._template.tagged and wanted.roles in (None, ["assistant"]):
            spans = [moved(span, everything) for span in self._enclosed(talk, messages, turns, whole)]
            ended = not spans or self._ends_in(text, spans[-1])
            found = [turn for turn in turns if messages[turn]["role"] != "assistant"]
        talk.check_size(found, whole)
        for turn in found:
            own = self._turn(talk, messages[turn], turn, whole, text, edits)
            ended &= messages[turn]["role"] != "assistant" or any(self._ends_in(text, span) for span in own)
            spans += own
        return spans, ended

    def _enclosed(self, talk: Conversation, messages: list[Message], turns: Sequence[int], whole: str) -> list[Span]:
        """The spans that the template's tags enclose, without those of turns that are not trained."""
        silent = [turn for turn, message in enumerate(messages) if not is_trained(message)]
        talk.check_size(silent, whole)
        untrained = [span for turn in silent for span in talk.place(turn, whole)]
        if self._wanted.turns == "last":
            last = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"][-1:]
            untrained += [(0, talk.place(turn, whole)[0][0]) for turn in last]
        return without(talk.enclosed(), joined(untrained)) if turns else []

    def _turn(
        self, talk: Conversation, message: Message, turn: int, whole: str, text: str, edits: Mapping[int, Edit]
    ) -> list[Span]:
        """The characters of the edited text that are trained of a turn."""
        everything = list(edits.values())
        found = talk.written(turn, whole) if message["role"] == "assistant" else [talk.said(turn, whole)]
        spans = [moved(span, everything) for span in found]
        if turn in edits:
            lead = moved_place(edits[turn].lead, everything)
            spans[0] = lead + edits[turn].prompted, spans[0][1]
        # Many templates put a line break after the end-of-turn token; generation has ended by then.
        ends = [self._after_end.search(text, start, end) for start, end in spans]
        return [(start, match.start(1) if match else end) for (start, end), match in zip(spans, ends, strict=True)]

    def _ends_in(self, text: str, span: Span) -> bool:
        """Whether what is trained ends with a token of its own, by which a server can stop."""
        begin, end = span
        return self._ended.search(text, max(begin, end - _LONGEST_END), end) is not None

    def _blocks(
        self, talk: Conversation, messages: list[Message], whole: str, edits: Mapping[int, Edit]
    ) -> Iterator[Span]:
        """The blocks of thinking in the edited text, with what the template writes around them."""
        everything, dropped = (
            list(edits.values()),
            [] if self._data.thinking == "strip" else self._dropped(talk, messages),
        )
        text = edited(whole, everything)
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            form = self._form(message)
            if turn in edits:
                thought = thought_of(message) or ""
                begin = moved_place(edits[turn].begin, everything) + edits[turn].text.index(thought)
                yield block_around(form, text, (begin, begin + len(thought)))
            elif thought_of(message) and turn not in dropped:
                place = talk.thought(turn, whole, with_thought(message, _MARK), _MARK)
                if place is None:
                    raise DataError(
                        f"turn {turn + 1}: its thinking is not found in the conversation's text, so it cannot be left untrained"
                    )
                yield block_around(form, text, moved(place, everything))
            else:
                yield from (moved(span, everything) for span in _empty_blocks(talk, form, turn, whole))

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


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def _check_shown(talk: Conversation, turns: Sequence[int], whole: str) -> None:
    """Raises `DataError` where the template leaves out what the assistant says in one of these turns: its end alone would be trained."""
    if lost := talk.vanished(turns, whole):
        turn, what = lost
        raise DataError(
            f"turn {turn + 1}: the chat template leaves out the assistant's {what}; set data.template to a template that writes them, or "
            "give the turn a weight of 0"
        )


def _empty_blocks(talk: Conversation, form: ThinkingForm | None, turn: int, whole: str) -> Iterator[Span]:
    """The empty block that the template writes where nothing was thought."""
    answer = talk.anchor(turn, whole) if form else None
    if form is None or answer is None:
        return
    if edit := emptied(form, whole, answer):
        yield edit.begin, edit.end
    elif whole.endswith(form.bare, 0, answer):
        yield from blocks(whole, answer - len(form.bare), answer)


def framing(tokenizer: "PreTrainedTokenizerBase", data: Data) -> tuple[int | None, int]:
    """The begin token, where the tokenizer itself puts one before a text, and the end token."""
    eos: Any = tokenizer.eos_token_id
    if eos is None:
        raise ConfigError(
            f"data.format: {data.format} ends each document with the tokenizer's eos_token, and the tokenizer of "
            "model.base has none. Set eos_token in its tokenizer_config.json."
        )
    bos: Any = tokenizer.bos_token_id
    adds_bos = bos is not None and _encoded(tokenizer, "a")[:1] == [bos]
    return bos if adds_bos else None, eos


def _encoded(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    ids: Any = tokenizer(text)["input_ids"]
    return ids
