"""Writes a conversation by the tokenizer's chat template, and finds which characters of the text are trained.

That is a question of where the assistant's turns lie in the text: a template with `{% generation %}` tags says so itself; otherwise
`conversation` finds the turns. Where thinking is kept or stripped, the text is that of the template with some edits (`thinking`), and
places in it are moved with them.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trainer.base.find.small_files import NAMED_TEMPLATES
from trainer.base.tokenizer import Tokenizer
from trainer.config import Data
from trainer.data.format.messages import THOUGHTS, Message, is_trained, read_messages, read_tools, without_system
from trainer.data.format.spans import Span, joined, without
from trainer.data.format.unrendered import END_OF_TURN, left_out
from trainer.data.render.conversation import Conversation
from trainer.data.render.templates.template import conversation_template, template_for_tools
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
from trainer.errors import DataError

# Stands for a thought. No tokenizer or template knows this character of the private use area.
_MARK = "\ue0f2"
_LONGEST_END = 128  # characters of a token that ends a turn, with white space behind it


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


class ChatText:
    """Conversations as text, by one tokenizer's template. `added` are its added tokens by number, and those of `special` end turns."""

    def __init__(self, tokenizer: Tokenizer, data: Data, added: Mapping[int, str], special: set[int]) -> None:
        self._data, self._wanted = data, data.wanted
        self._template = conversation_template(tokenizer, data)
        self._template.check_prompt()
        self._for_tools = template_for_tools(tokenizer, data)
        # A token that a run adds is special to no tokenizer, and may still be that which ends a turn.
        self.special = special | {
            number for number, token in added.items() if token and self._template.end.startswith(token)
        }
        self._ends = _any_of(added[number] for number in self.special)
        self._after_end = re.compile(f"(?:{self._ends.pattern})(\\s+)\\Z")
        self._ended = re.compile(f"(?:{_any_of(added.values()).pattern})\\s*\\Z")

    def render(self, given: Any, given_tools: Any) -> Rendered:
        """The text of a row's messages and tools, and what of it is trained. Raises `DataError` for a row that cannot be trained so."""
        messages, tools = read_messages(given), read_tools(given_tools)
        if self._data.drop_system:
            messages = without_system(messages)
            given = given[-len(messages) :]
        if tools and self._for_tools:
            raise DataError(
                f"its tools would be rendered by the tokenizer's template {self._for_tools} wherever the model is used, and conversations are "
                f"trained by the default one; set data.template to a file with that template, {NAMED_TEMPLATES}/{self._for_tools}.jinja of the base"
            )
        if self._data.thinking == "strip":
            messages = given = [without_thinking(message) for message in messages]
        if self._data.thinking == "keep":
            messages = [self._as_kept(message) for message in messages]
        if self._data.thinking == "as_template":
            messages = [self._as_read(message) for message in messages]
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

    def _as_read(self, message: Message) -> Message:
        """The message with its thinking by a key where the template reads that: tags in its content would stand in the answer, or behind
        an empty block of the template's."""
        if thought_of(message) is None or any(key in message for key in THOUGHTS):
            return message
        form = self._form(message)
        return form.given(message) if form and form.by_key else message

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
                place = talk.marked(turn, whole, with_thought(message, _MARK), _MARK)
                if place is None:
                    raise DataError(
                        f"turn {turn + 1}: its thinking is not found in the conversation's text, so it cannot be left untrained"
                    )
                yield block_around(form, text, moved(place, everything))
            else:
                yield from (moved(span, everything) for span in _empty_blocks(talk, form, turn, whole))


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
        lead = answer - len(form.bare)
        yield from ((min(begin, lead + form.begin), end) for begin, end in blocks(whole, lead, answer))
