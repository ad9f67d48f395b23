"""Renders a conversation with the tokenizer's chat template, and finds which characters of the text are trained.

For that it needs the places of the assistant's turns. A template with `{% generation %}` tags marks them itself;
otherwise `conversation` finds them. If thinking is kept or stripped, the template's text is edited (`thinking`), and
places in it move with the edits.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from trainer.base.base import Tokenizer
from trainer.config import Data
from trainer.data.format.messages import (
    THOUGHTS,
    Message,
    is_trained,
    read_messages,
    read_tools,
    with_default_system,
    without_system,
)
from trainer.data.format.spans import Span, joined, without
from trainer.data.format.unrendered import END_OF_TURN, left_out
from trainer.data.render.chat_template import conversation_template, template_for_tools
from trainer.data.render.conversation import Conversation
from trainer.data.render.thinking import (
    Edit,
    EditedText,
    ThinkingForm,
    block_around,
    blocks,
    emptied,
    filled,
    kept,
    thought_of,
    with_thought,
    without_thinking,
)
from trainer.errors import DataError
from trainer.store.tokenizer_files import NAMED_TEMPLATES

# Replaces a thought. No tokenizer or template knows this character of the private use area.
_MARK = "\ue0f2"
_LONGEST_END = 128  # characters of a token that ends a turn, with white space after it


@dataclass(frozen=True)
class Rendered:
    """A document's text and its trained characters, `spans`, which are sorted and disjoint.

    Texts without a chat template get an end-of-text token; `end_trained` says whether it is trained. `left_out` is as
    in `Example`.
    """

    text: str
    spans: list[Span]
    end_trained: bool = True
    left_out: Sequence[str] = ()


class ChatText:
    """Renders conversations with one tokenizer's template.

    `added` has the tokenizer's added tokens by number. Those in `special` may end turns.
    """

    def __init__(self, tokenizer: Tokenizer, data: Data, added: Mapping[int, str], special: set[int]) -> None:
        self._data, self._wanted = data, data.wanted
        self._template = conversation_template(tokenizer, data)
        self._template.check_prompt()
        self._for_tools = template_for_tools(tokenizer, data)
        # A token that a run adds is not special to the tokenizer, but may still be the one that ends a turn.
        self.special = special | {
            number for number, token in added.items() if token and self._template.end.startswith(token)
        }
        self._ends = _any_of(added[number] for number in self.special)
        self._after_end = re.compile(f"(?:{self._ends.pattern})(\\s+)\\Z")
        self._ended = re.compile(f"(?:{_any_of(added.values()).pattern})\\s*\\Z")

    def render(self, given: Any, given_tools: Any) -> Rendered:
        """The text of a row's messages and tools, and its trained characters.

        Raises `DataError` if the row cannot be trained in this way.
        """
        messages, tools = read_messages(given), read_tools(given_tools)
        if self._data.drop_system:
            messages = without_system(messages)
            given = given[-len(messages) :]
        messages = with_default_system(messages, self._data.system)
        given = [*messages[: len(messages) - len(given)], *given]
        if tools and self._for_tools:
            raise DataError(
                f"its tools would be rendered by the tokenizer's template {self._for_tools} wherever the model is used,"
                " and conversations are trained by the default one; set data.template to a file with that template,"
                f" {NAMED_TEMPLATES}/{self._for_tools}.jinja of the base"
            )
        if self._data.thinking == "strip":
            messages = given = [without_thinking(one, anywhere=self._template.reads_tags) for one in messages]
        if self._data.thinking in ("keep", "always"):
            messages = [self._as_kept(message) for message in messages]
        if self._data.thinking == "as_template":
            messages = [self._as_read(message) for message in messages]
        talk = Conversation(self._template, self._ends, messages, tools)
        turns = self._trained_turns(messages)
        _check_shown(talk, [turn for turn in turns if messages[turn]["role"] == "assistant"])
        edited = EditedText(talk.whole, self._edits(talk))
        spans, ended = self._spans(talk, turns, edited)
        untrained = [edited.moved(span) for turn in range(len(messages)) for span in talk.silent(turn)]
        if not self._wanted.thinking:
            untrained += self._blocks(talk, edited)
        elif self._data.thinking == "always":
            bare = [turn for turn, message in enumerate(messages) if _lacks_thought(message)]
            untrained += [span for turn in bare for span in self._empty(talk, turn, edited)]
        lacking = [
            *(["tools"] if tools and talk.ignores_tools() else []),
            *left_out(given, messages, edited.text),
            *([] if ended or not self._wanted.end else [f"{END_OF_TURN} {self._next_tag}".strip()]),
        ]
        return Rendered(edited.text, without(joined(spans), joined(untrained)), left_out=lacking)

    @cached_property
    def _next_tag(self) -> str:
        """The token with which the template begins a question after an answer. Empty if it begins with no token."""
        match = re.match(rf"\s*({self._ends.pattern})", self._template.behind_an_answer)
        return match[1] if match else ""

    def _as_kept(self, message: Message) -> Message:
        form = self._form(message)
        return form.given(message) if form else message

    def _as_read(self, message: Message) -> Message:
        """The message with its thinking under a key, if the template reads that key.

        Tags in the content would end up in the answer, or after an empty block that the template writes."""
        if thought_of(message) is None or any(key in message for key in THOUGHTS):
            return message
        form = self._form(message)
        return form.given(message) if form and form.by_key else message

    def _form(self, message: Message) -> ThinkingForm | None:
        """How the template writes the thinking of a turn such as this one."""
        return self._template.thinking(calls="tool_calls" in message and not message["content"].strip())

    def _trained_turns(self, messages: list[Message]) -> list[int]:
        """The turns that are at least partly trained, because of their roles or because the row asks for it."""
        roles = self._wanted.roles or ["assistant"]
        turns = [turn for turn, message in enumerate(messages) if roles == "all" or message["role"] in roles]
        turns = turns[-1:] if self._wanted.turns == "last" else turns
        asked = [turn for turn, message in enumerate(messages) if message.get("train")]
        return sorted(turn for turn in {*turns, *asked} if is_trained(messages[turn]))

    def _edits(self, talk: Conversation) -> dict[int, Edit]:
        """Turn -> the edit that `data.thinking` makes in the template's text."""
        if self._data.thinking == "as_template":
            return {}
        messages = talk.messages
        turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
        if self._data.thinking == "strip":
            forms = {turn: form for turn in turns if (form := self._form(messages[turn])) and form.empty != form.bare}
            places = {turn: talk.anchor(turn) for turn in forms}
            found = {turn: emptied(forms[turn], talk.whole, at) for turn, at in places.items() if at is not None}
            return {turn: edit for turn, edit in found.items() if edit}
        found = {turn: self._kept(talk, turn) for turn in self._dropped(talk)}
        if self._data.thinking == "always":
            edits = {turn: self._filled(talk, turn) for turn in turns if _lacks_thought(messages[turn])}
            found |= {turn: edit for turn, edit in edits.items() if edit}
        return dict(sorted(found.items()))

    def _filled(self, talk: Conversation, turn: int) -> Edit | None:
        """The edit that writes an empty block of thinking into a turn. None if the template has written one."""
        form, place = self._form(talk.messages[turn]), talk.anchor(turn)
        try:
            if form and place is not None:
                return filled(form, talk.whole, place)
        except ValueError:
            pass
        raise DataError(
            f"turn {turn + 1}: the chat template shows no form for an empty block of thinking; set data.thinking to"
            " as_template or strip, or data.template to a template that writes thinking"
        )

    def _empty(self, talk: Conversation, turn: int, edited: EditedText) -> Iterator[Span]:
        """Yield the empty block of thinking in a turn that has no thought."""
        form, place = self._form(talk.messages[turn]), talk.anchor(turn)
        if (edit := edited.by_turn.get(turn)) and form and place is not None:
            answer = edited.moved_place(edit.begin) + len(edit.text) + place - edit.end
            yield answer - len(form.full("")) + form.begin, answer
        else:
            yield from map(edited.moved, _empty_blocks(talk, form, turn))

    def _dropped(self, talk: Conversation) -> list[int]:
        """The turns whose thinking the template leaves out.

        A mark replaces each thought to find out, because a thought's words may also stand in an answer.
        """
        messages = talk.messages
        marks = {turn: f"{_MARK}{turn}{_MARK}" for turn, message in enumerate(messages) if thought_of(message)}
        if not marks:
            return []
        text = talk.with_all({turn: with_thought(messages[turn], mark) for turn, mark in marks.items()})
        return [turn for turn, mark in marks.items() if mark not in text]

    def _kept(self, talk: Conversation, turn: int) -> Edit:
        message = talk.messages[turn]
        form, place = self._form(message), talk.anchor(turn)
        edit = None
        if form and not form.as_content and place is not None:
            edit = kept(form, talk.whole, place, thought_of(message) or "")
        if edit is None:
            raise DataError(
                f"turn {turn + 1}: the chat template leaves out its thinking and shows no form for it, so it cannot be"
                " kept; set data.thinking to as_template or strip, or data.template to a template that writes it"
            )
        return edit

    def _spans(self, talk: Conversation, turns: Sequence[int], edited: EditedText) -> tuple[list[Span], bool]:
        """The trained spans of the edited text, and whether an end is trained in each of the assistant's turns."""
        messages, wanted = talk.messages, self._wanted
        if wanted.roles == "all":
            kept_out = [edited.moved(span) for span in _silent(talk)]
            return without([(0, len(edited.text))], joined(kept_out)), True
        spans, ended, found = list[Span](), True, turns
        if self._template.tagged and wanted.roles in (None, ["assistant"]):
            spans = [edited.moved(span) for span in self._enclosed(talk, turns)]
            ended = not spans or self._ends_in(edited.text, spans[-1])
            found = [turn for turn in turns if messages[turn]["role"] != "assistant"]
        talk.check_size(found)
        for turn in found:
            own = self._turn(talk, turn, edited)
            ended &= messages[turn]["role"] != "assistant" or any(self._ends_in(edited.text, span) for span in own)
            spans += own
        return spans, ended

    def _enclosed(self, talk: Conversation, turns: Sequence[int]) -> list[Span]:
        """The spans between the template's tags, without those of untrained turns."""
        untrained = _silent(talk)
        if self._wanted.turns == "last":
            last = [turn for turn, message in enumerate(talk.messages) if message["role"] == "assistant"][-1:]
            untrained += [(0, talk.place(turn)[0][0]) for turn in last]
        return without(talk.enclosed(), joined(untrained)) if turns else []

    def _turn(self, talk: Conversation, turn: int, edited: EditedText) -> list[Span]:
        """The trained characters of a turn in the edited text."""
        is_assistants = talk.messages[turn]["role"] == "assistant"
        if is_assistants and self._wanted.frame is True:
            return [edited.moved(span) for span in talk.place(turn)]
        found = talk.written(turn) if is_assistants else [talk.said(turn)]
        spans = [edited.moved(span) for span in found]
        if edit := edited.by_turn.get(turn):
            spans[0] = edited.moved_place(edit.lead) + edit.prompted, spans[0][1]
        if is_assistants and self._wanted.frame == "tail":
            return spans
        # Many templates put a line break after the end-of-turn token, where generation has already ended.
        ends = [self._after_end.search(edited.text, start, end) for start, end in spans]
        return [(start, match.start(1) if match else end) for (start, end), match in zip(spans, ends, strict=True)]

    def _ends_in(self, text: str, span: Span) -> bool:
        """Whether the trained span ends with an added token, at which a server can stop."""
        begin, end = span
        return self._ended.search(text, max(begin, end - _LONGEST_END), end) is not None

    def _blocks(self, talk: Conversation, edited: EditedText) -> Iterator[Span]:
        """Yield the blocks of thinking in the edited text, with what the template writes around them."""
        text, dropped = edited.text, [] if self._data.thinking == "strip" else self._dropped(talk)
        for turn, message in enumerate(talk.messages):
            if message["role"] != "assistant":
                continue
            if self._data.thinking == "always" and _lacks_thought(message):
                yield from self._empty(talk, turn, edited)
                continue
            form = self._form(message)
            if edit := edited.by_turn.get(turn):
                thought = thought_of(message) or ""
                begin = edited.moved_place(edit.begin) + edit.text.index(thought)
                yield block_around(form, text, (begin, begin + len(thought)))
            elif thought_of(message) and turn not in dropped:
                place = talk.marked(turn, with_thought(message, _MARK), _MARK)
                if place is None:
                    raise DataError(
                        f"turn {turn + 1}: its thinking is not found in the conversation's text, so it cannot be left"
                        " untrained"
                    )
                yield block_around(form, text, edited.moved(place))
            else:
                yield from map(edited.moved, _empty_blocks(talk, form, turn))


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def _lacks_thought(message: Message) -> bool:
    return message["role"] == "assistant" and thought_of(message) is None


def _silent(talk: Conversation) -> list[Span]:
    """The characters of the turns that their rows leave untrained."""
    silent = [turn for turn, message in enumerate(talk.messages) if not is_trained(message)]
    talk.check_size(silent)
    return [span for turn in silent for span in talk.place(turn)]


def _check_shown(talk: Conversation, turns: Sequence[int]) -> None:
    """Raises `DataError` if the template leaves out what the assistant says in one of these turns.

    Only the end of that turn would be trained.
    """
    if lost := talk.vanished(turns):
        turn, what = lost
        raise DataError(
            f"turn {turn + 1}: the chat template leaves out the assistant's {what}; set data.template to a template"
            " that writes them, or give the turn a weight of 0"
        )


def _empty_blocks(talk: Conversation, form: ThinkingForm | None, turn: int) -> Iterator[Span]:
    """Yield the empty block that the template writes in a turn without thinking."""
    whole, answer = talk.whole, talk.anchor(turn) if form else None
    if form is None or answer is None:
        return
    if edit := emptied(form, whole, answer):
        yield edit.begin, edit.end
    elif whole.endswith(form.bare, 0, answer):
        lead = answer - len(form.bare)
        yield from ((min(begin, lead + form.begin), end) for begin, end in blocks(whole, lead, answer))
