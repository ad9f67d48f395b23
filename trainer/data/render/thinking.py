"""The thinking of reasoning models: text before an answer, in `reasoning_content` or between tags in the content.

Chat templates write the thinking of the last turn, and most drop that of earlier turns, which a model does not see when
it answers. Capstan knows no template's form. It finds it by rendering test conversations whose contents are marks.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from trainer.data.format.messages import THOUGHTS, Message
from trainer.data.format.spans import Span, shared_beginning, shared_end
from trainer.errors import DataError

OPEN, CLOSE = "<think>", "</think>"
_BEFORE_ANSWER = re.compile(rf"\s*{OPEN}(.*?){CLOSE}\s*", re.DOTALL)
_BLOCK = re.compile(rf"{OPEN}.*?{CLOSE}\s*", re.DOTALL)
_OPENED, _CLOSED = re.compile(rf"{OPEN}\s*\Z"), re.compile(rf"\s*{CLOSE}\s*")
_FAR = 64  # the most characters of white space between a tag and a thought
# Characters of the private use area, which no tokenizer or template knows.
_ASKED, _ANSWERED, _THOUGHT = "\ue0f5asked\ue0f5", "\ue0f6answered\ue0f6", "\ue0f7thought\ue0f7"


def thought_of(message: Message) -> str | None:
    """The thought of the message: from its key, or from between tags at the beginning of the content.

    White space around it is removed.
    """
    if message["role"] != "assistant":
        return None
    by_key = next((message[key] for key in THOUGHTS if isinstance(message.get(key), str)), None)
    within = _BEFORE_ANSWER.match(message["content"])
    return (by_key or (within[1] if within else "")).strip() or None


def with_thought(message: Message, thought: str) -> Message:
    """The message with its thought replaced, in the place where it already has one."""
    keys = {key: thought for key in THOUGHTS if isinstance(message.get(key), str)}
    content, within = message["content"], _BEFORE_ANSWER.match(message["content"])
    return {
        **message,
        **keys,
        "content": content[: within.start(1)] + thought + content[within.end(1) :] if within else content,
    }


def without_thinking(message: Message, *, anywhere: bool = False) -> Message:
    """The message with only its answer: without what is before it, and with `anywhere` without any block in it."""
    if message["role"] != "assistant":
        return message
    rest = {key: value for key, value in message.items() if key not in THOUGHTS}
    within = _BEFORE_ANSWER.match(message["content"])
    answer = message["content"][within.end() if within else 0 :]
    return {**rest, "content": _BLOCK.sub("", answer) if anywhere else answer}


def _by_key(message: Message, thought: str) -> Message:
    return {**message, THOUGHTS[0]: thought}


def _in_tags(message: Message, thought: str) -> Message:
    return {**message, "content": f"{OPEN}\n{thought}\n{CLOSE}\n\n{message['content']}"}


@dataclass(frozen=True)
class ThinkingForm:
    """How a template writes thinking.

    Each text below reaches from the beginning of an assistant's turn to its answer, or to the name of its first call if
    it has no words.

    Attributes:
        by_key: whether the thinking comes under a key of the message, and not between tags in the content.
        as_content: whether the template writes tags in a content like any other text, so it has no form of its own.
        prompt: the generation prompt.
        bare: the text in an earlier turn without thinking.
        dropped: the text in an earlier turn whose thinking the template leaves out.
        empty: the text in the last turn without thinking; some templates write an empty block there.
        before, after: the texts around the thinking in the last turn.
    """

    by_key: bool
    as_content: bool
    prompt: str
    bare: str
    dropped: str
    empty: str
    before: str
    after: str

    def given(self, message: Message) -> Message:
        """The message with its thinking in the place where the template reads it."""
        thought = thought_of(message)
        if thought is None or (self.as_content and any(key in message for key in THOUGHTS)):
            return message
        return (_by_key if self.by_key else _in_tags)(without_thinking(message), thought)

    def full(self, thought: str) -> str:
        return self.before + thought + self.after

    @property
    def begin(self) -> int:
        """The number of a turn's characters before a thought that do not depend on it.

        The template writes them without a thought too, or the generation prompt has written them."""
        return min(shared_beginning(self.bare, self.before), shared_beginning(self.prompt, self.before))

    @property
    def around(self) -> tuple[str, str]:
        """The texts around a thought that the template writes only if there is one."""
        end = shared_end(self.bare[self.begin :], self.after)
        return self.before[self.begin :], self.after[: len(self.after) - end]


def find_form(render: Callable[..., str], *, calls: bool) -> ThinkingForm | None:
    """The form of turns with an answer, or with `calls` only. None if the template does not show it.

    `render` makes a text of messages."""
    asks: Message = {"role": "user", "content": _ASKED}
    turn = _call(_ANSWERED) if calls else {"role": "assistant", "content": _ANSWERED}
    result = [{"role": "tool", "name": "f", "content": "b", "tool_call_id": "call00001"}] if calls else []
    later = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    middle = [*result, *([later[1]] if calls else []), *later]

    def lead(message: Message, *behind: Message) -> str | None:
        return _lead(render, asks, [message, *behind])

    try:
        prompt = _behind_question(render([asks], generation_prompt=True), render([asks]))
    except DataError:
        return None
    bare, empty = lead(turn, *middle), lead(turn)
    if bare is None or empty is None or CLOSE in prompt:  # the prompt already ends the thinking
        return None
    for way in (_by_key, _in_tags):
        found = (lead(way(turn, _THOUGHT)) or "").split(_THOUGHT)
        if len(found) == 2:
            earlier = lead(way(turn, _THOUGHT), *middle)
            verbatim = way is _in_tags and earlier == bare + _TAGS and found == [bare + _BEFORE, _AFTER]
            as_content = verbatim and OPEN not in prompt
            dropped = earlier if earlier is not None and _THOUGHT not in earlier else bare
            return ThinkingForm(way is _by_key, as_content, prompt, bare, dropped, empty, found[0], found[1])
    # The template removed the text between the tags, so it knows them, and its models do too.
    if not calls and lead(_in_tags(turn, _THOUGHT)) is not None:
        return ThinkingForm(True, False, prompt, bare, bare, empty, bare + _BEFORE, _AFTER)
    return None


_BEFORE, _AFTER = f"{OPEN}\n", f"\n{CLOSE}\n\n"
_TAGS = _BEFORE + _THOUGHT + _AFTER


def _call(name: str) -> Message:
    call = {"type": "function", "function": {"name": name, "arguments": {}}, "id": "call00001"}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _lead(render: Callable[..., str], asks: Message, turns: list[Message]) -> str | None:
    """The text of the first of `turns` before its answer. None if the answer is not in the text."""
    try:
        text, alone = render([asks, *turns]), render([asks])
    except DataError:
        return None
    before, answer, _ = text.partition(_ANSWERED)
    return _behind_question(before, alone) if answer and _ASKED in before else None


def _behind_question(text: str, alone: str) -> str:
    """The text after the question's turn. `alone` is the text of the question, whose end belongs to its turn."""
    behind = text.rpartition(_ASKED)[2]
    return behind.removeprefix(alone.rpartition(_ASKED)[2])


@dataclass(frozen=True)
class Edit:
    """Replaces the characters [begin, end) of a text.

    `lead` is the beginning of the edited turn. `prompted` is the number of characters from there on that the generation
    prompt has written."""

    begin: int
    end: int
    text: str
    lead: int
    prompted: int

    @property
    def growth(self) -> int:
        return len(self.text) - (self.end - self.begin)


def kept(form: ThinkingForm, whole: str, answer: int, thought: str) -> Edit | None:
    """The edit that writes a dropped thought before the answer, which begins at `answer`.

    None if the turn does not begin as the template's earlier turns do."""
    return _replaced(form, whole, answer, form.dropped, form.full(thought))


def emptied(form: ThinkingForm, whole: str, answer: int) -> Edit | None:
    """The edit that removes an empty block before the answer. None if there is none."""
    return None if form.empty == form.bare else _replaced(form, whole, answer, form.empty, form.bare)


def filled(form: ThinkingForm, whole: str, answer: int) -> Edit | None:
    """The edit that writes an empty block before the answer. None if one is there.

    Raises `ValueError` if the turn does not begin as the template's turns do."""
    empty = form.full("")
    if whole.endswith(empty, 0, answer):
        return None
    if (edit := _replaced(form, whole, answer, form.bare, empty)) is None:
        raise ValueError("the turn begins in another way")
    return edit


def _replaced(form: ThinkingForm, whole: str, answer: int, old: str, new: str) -> Edit | None:
    if not whole.endswith(old, 0, answer):
        return None
    prompted = shared_beginning(new, form.prompt)
    lead, same = answer - len(old), min(shared_beginning(old, new), prompted)
    end = shared_end(old[same:], new[same:])
    return Edit(lead + same, answer - end, new[same : len(new) - end], lead, prompted)


class EditedText:
    """The text `whole` with an edit in some turns. Edits are sorted and disjoint."""

    def __init__(self, whole: str, by_turn: Mapping[int, Edit]) -> None:
        self.by_turn, self._edits = by_turn, list(by_turn.values())
        self.text = whole
        for edit in reversed(self._edits):
            self.text = self.text[: edit.begin] + edit.text + self.text[edit.end :]

    def moved(self, span: Span) -> Span:
        """The place in the edited text of a span of the whole.

        Text that an edit inserts at its beginning belongs to the span; text inserted after its end does not.
        """
        begin, end = span
        before = [edit for edit in self._edits if edit.begin < begin]
        within = [edit for edit in self._edits if edit.begin < end]
        begin = max([begin, *(edit.end for edit in before)])
        end = max([end, *(edit.end for edit in within)])
        return begin + sum(edit.growth for edit in before), end + sum(edit.growth for edit in within)

    def moved_place(self, place: int) -> int:
        """The place in the edited text of a place in the whole, before any text that an edit inserts there."""
        return self.moved((place, place))[0]


def block_around(form: ThinkingForm | None, text: str, thought: Span) -> Span:
    """The block of a thought in the text.

    It includes what the template writes around the thought, and tags with the white space after them.
    """
    begin, end = thought
    opened, closed = _OPENED.search(text, max(0, begin - _FAR), begin), _CLOSED.match(text, end)
    tagged = (opened.start(), closed.end()) if opened and closed else thought
    before, after = form.around if form else ("", "")
    if text.endswith(before, 0, begin) and text.startswith(after, end):
        begin, end = begin - len(before), end + len(after)
    return min(begin, tagged[0]), max(end, tagged[1])


def blocks(text: str, begin: int, end: int) -> Iterator[Span]:
    """The blocks between tags in a part of a text that the template itself wrote."""
    return (match.span() for match in _BLOCK.finditer(text, begin, end))
