"""One conversation in a chat template: its text, and where in it a turn lies.

A turn reaches from the end of the generation prompt to the end of its text, as the text of the conversation up to there begins the
whole. Templates do not always keep to that: those of models that reason drop what earlier turns thought, others move the system message
to the last question. There a turn is found by rendering the conversation once more with another content in its place, and from where the
turn before it ends.
"""

import re
from collections.abc import Mapping, Sequence

from trainer.data.format.messages import UNTRAINED, Message
from trainer.data.format.spans import Span, shared_beginning
from trainer.data.render.templates.chat_template import ChatTemplate, Tools
from trainer.data.render.thinking import OPEN
from trainer.errors import DataError

# Finding a turn renders all that is before it, twice. For the turns of one row together, these are the most messages and
# characters, some five seconds' work: about 1,000 turns of which every second one is the assistant's.
_MOST_MESSAGES, _MOST_CHARACTERS = 2**19, 2**30
# Stands for the content of a turn. No tokenizer or template knows this character of the private use area.
_MARK = "\ue0ff"


class Misplaced(DataError):
    """The place of a turn in the whole text cannot be told by the text up to it."""


class Conversation:
    """One conversation, whose beginnings are rendered too. `ends` matches the tokenizer's special tokens, which may end a turn."""

    def __init__(self, template: ChatTemplate, ends: re.Pattern[str], messages: list[Message], tools: Tools) -> None:
        self._template, self._tools = template, tools
        self._ends, self._messages = ends, messages
        self._contents: dict[int, Span | None] = {}

    def render(self, count: int, generation_prompt: bool = False) -> str:
        """The text of the first `count` messages."""
        return self._text(self._messages[:count], generation_prompt)

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
            return self._template.render(self._messages) == whole
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
            raise Misplaced(
                f"turn {turn}: what the chat template makes of the conversation up to it is not how the whole begins, so "
                "its place is unknown; give data.template a template with {% generation %} tags, or set data.loss_on: all"
            )
        return len(prefix)

    def vanished(self, turns: Sequence[int], whole: str) -> tuple[int, str] | None:
        """The first of these turns whose content or calls the template leaves out, and which of both; None where all come out."""
        others, marks = dict[int, Message](), dict[str, tuple[int, int | None]]()
        for turn in turns:
            message = self._messages[turn]
            names = {f"{_MARK}{turn}.{number}{_MARK}": number for number in range(len(message.get("tool_calls") or []))}
            if names:
                message = _renamed(message, list(names))
            if message["content"].strip():
                mark = f"{_MARK}{turn}{_MARK}"  # at the end, as thinking is dropped from the beginning
                message = {**message, "content": message["content"] + mark}
                marks[mark] = turn, None
            marks |= {name: (turn, number) for name, number in names.items()}
            others[turn] = message
        try:
            text = self.with_all(others) if marks else ""
        except DataError:  # it may look into a content, and refuse this one
            return None
        lost = (place for mark, place in marks.items() if mark not in text)
        return next(
            (
                (turn, "content" if number is None else "calls")
                for turn, number in lost
                if number is None or self._is_same_without(turn, number, whole)
            ),
            None,
        )

    def _is_same_without(self, turn: int, number: int, whole: str) -> bool:
        """Whether the text would be the same without a call: some templates write its arguments and not its name."""
        message = self._messages[turn]
        calls = [call for index, call in enumerate(message["tool_calls"]) if index != number]
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        try:
            return self._with(turn, {**rest, "tool_calls": calls} if calls else rest) == whole
        except DataError:
            return False

    def written(self, turn: int, whole: str) -> list[Span]:
        """The characters of the whole text that the model has to write in an assistant's turn, with white space behind its end. They are
        several spans where the template puts something else between a turn's calls and its words.

        Raises:
            DataError: the place of the turn cannot be told.
        """
        if turn == 0:
            raise DataError(
                "turn 1 is the assistant's, so where it begins is unknown; "
                "begin with another turn, or give data.template a template with {% generation %} tags"
            )
        try:
            return [(self.prefix(turn, whole, generation_prompt=True), self.prefix(turn + 1, whole))]
        except Misplaced as error:
            anchor = self.anchor(turn, whole)
            if anchor is None:
                raise
            span = self._begin(turn, whole, anchor, error), self._end(turn, whole)
            if self._is_alone(turn, whole, span):
                return [span]
            return self._apart(turn, whole, error)

    def said(self, turn: int, whole: str) -> Span:
        """The characters of the whole text that a message of another role has as its content, and the end of its turn."""
        content = self.content(turn, whole)
        if content is None:
            raise Misplaced(f"turn {turn + 1}: its content is not found in the conversation's text")
        begin, end = content
        try:
            return begin, max(end, self.prefix(turn + 1, whole))
        except Misplaced:
            return begin, end

    def place(self, turn: int, whole: str) -> list[Span]:
        """The characters of a whole turn, or of as much of it as can be told."""
        try:
            return [(self.prefix(turn, whole), self.prefix(turn + 1, whole))]
        except Misplaced:
            return (
                self.written(turn, whole) if self._messages[turn]["role"] == "assistant" else [self.said(turn, whole)]
            )

    def silent(self, turn: int, whole: str) -> list[Span]:
        """The characters of a turn's content that its row leaves untrained.

        Raises:
            DataError: the template rewrites the content, so that their places are unknown.
        """
        message = self._messages[turn]
        if UNTRAINED not in message:
            return []
        content, place = message["content"], self.content(turn, whole)
        text = whole[slice(*place)] if place else ""
        if not place or content.strip() != text.strip():
            raise DataError(
                f"turn {turn + 1}: the chat template rewrites its content, so which characters are not to be trained is unknown; give "
                "the turn a weight as a whole"
            )
        begin = place[0] + _indent(text) - _indent(content)
        found = ((max(place[0], begin + start), min(place[1], begin + end)) for start, end in message[UNTRAINED])
        return [(start, end) for start, end in found if start < end]

    def marked(self, turn: int, whole: str, message: Message, mark: str) -> Span | None:
        """The characters in whose place `mark` stands once `message` is that of the turn; None where that cannot be told."""
        before, found, after = self._with(turn, message).partition(mark)
        if not found or mark in after or not whole.endswith(after):
            return None
        # Templates write a line break between a content and a call; of an empty content that would be the one before the call.
        begin = shared_beginning(before, whole)
        return begin, max(begin, len(whole) - len(after))

    def anchor(self, turn: int, whole: str) -> int | None:
        """Where a turn's words begin, or the name of its first call where it has no words; None where that cannot be told."""
        message = self._messages[turn]
        if message["content"].strip() or not message.get("tool_calls"):
            content = self.content(turn, whole)
            return content and content[0]
        before, mark, _ = self._with(turn, _renamed(message, [_MARK])).partition(_MARK)
        return len(before) if mark and whole.startswith(before) else None

    def content(self, turn: int, whole: str) -> Span | None:
        """The characters in which the text differs once the content of the turn is another; None where that cannot be told."""
        if turn not in self._contents:
            self._contents[turn] = self.marked(turn, whole, {**self._messages[turn], "content": _MARK}, _MARK)
        return self._contents[turn]

    def _begin(self, turn: int, whole: str, anchor: int, otherwise: Misplaced) -> int:
        """The place behind the generation prompt of a turn whose words or calls begin at `anchor`.

        The prompt follows the end of the turn before it, if that can be told. Else it is the last one before the anchor. One that opens
        a block of thinking may be there without it.
        """
        before = self.content(turn - 1, whole)
        if before is not None:
            marked = [*self._messages[: turn - 1], {**self._messages[turn - 1], "content": _MARK}]
            behind = self._text(marked, True).partition(_MARK)[2]
            for one in (behind, behind.partition(OPEN)[0]):
                if one and whole.startswith(one, before[1]) and before[1] + len(one) <= anchor:
                    return before[1] + len(one)
        prompted = self.render(turn, generation_prompt=True)
        prompt = prompted[shared_beginning(prompted, self.render(turn)) :]
        sought = {prompt, prompt.partition(OPEN)[0]} - {""}
        places = [(place, len(one)) for one in sought if (place := whole.rfind(one, 0, anchor)) >= 0]
        if places and self._is_alone(turn, whole, (sum(max(places)), anchor)):
            return sum(max(places))  # of two at one place the longer
        if self._goes_on(turn, whole, anchor):
            return anchor
        raise otherwise

    def _goes_on(self, turn: int, whole: str, anchor: int) -> bool:
        """Whether a turn goes on where the words of an earlier one of the assistant end, to whose calls there were results."""
        for earlier in reversed(range(turn)):
            content = self.content(earlier, whole)
            if self._messages[earlier]["role"] not in ("assistant", "tool"):
                return False
            if content is not None and content[0] < content[1] == anchor:
                return True
        return False

    def _end(self, turn: int, whole: str) -> int:
        """The end of a turn's words and calls, and of the token that ends it where one follows."""
        message = self._messages[turn]
        content = self.content(turn, whole)
        if content is not None and (message["content"].strip() or not message.get("tool_calls")):
            marked, begin = {**message, "content": _MARK}, content[1]
        else:
            marked, begin = _renamed(message, [_MARK]), self.anchor(turn, whole) or 0
            begin += len(message["tool_calls"][0]["function"].get("name") or "")
        behind = self._text([*self._messages[:turn], marked]).partition(_MARK)[2]
        if (written := behind.rstrip()) and whole.startswith(written, begin):
            return begin + len(written)
        calls = re.sub(rf"\s*(?:{self._ends.pattern})?\s*\Z", "", behind)
        end = begin + len(calls) if whole.startswith(calls, begin) else begin
        closing = behind[len(calls) :].strip()
        own = self._template.end.removesuffix(closing).rstrip()
        if own and calls.endswith(own) and self._template.behind_an_answer.lstrip().startswith(own):
            return end  # `closing` ends a conversation, and no turn
        # Where the last turn of a conversation has no token at its end, the one that follows here begins the next turn.
        match = re.compile(rf"\s*(?:{self._ends.pattern})").match(whole, end) if closing else None
        return match.end() if match else end

    def _is_alone(self, turn: int, whole: str, span: Span) -> bool:
        """Whether the span of a turn reaches neither over the content of the turn before it, nor over that of the one behind it."""
        before = self.content(turn - 1, whole)
        behind = self.content(turn + 1, whole) if turn + 1 < len(self._messages) else None
        return not ((before and span[0] < before[1]) or (behind and behind[0] < behind[1] <= span[1]))

    def _apart(self, turn: int, whole: str, otherwise: Misplaced) -> list[Span]:
        """The spans of a turn whose words stand behind the results of its calls."""
        message, words = self._messages[turn], self.content(turn, whole)
        if not message.get("tool_calls") or words is None:
            raise otherwise
        silent = [*self._messages[:turn], {**message, "content": ""}, *self._messages[turn + 1 :]]
        without = Conversation(self._template, self._ends, silent, self._tools)
        calls = without.written(turn, without.render(len(silent)))
        if not calls or calls[-1][1] > shared_beginning(without.render(len(silent)), whole) or calls[-1][1] > words[0]:
            raise otherwise
        return [*calls, (words[0], self._end(turn, whole))]

    def with_all(self, others: Mapping[int, Message]) -> str:
        """The text of the whole conversation with others in the places of some messages, by turn."""
        return self._text([others.get(turn, message) for turn, message in enumerate(self._messages)])

    def enclosed(self) -> list[Span]:
        """The characters that the template's {% generation %} tags enclose."""
        return self._template.enclosed(self._messages, self._tools)

    def _with(self, turn: int, message: Message) -> str:
        """The text of the whole conversation with another message in the place of one."""
        return self.with_all({turn: message})

    def _text(self, messages: list[Message], generation_prompt: bool = False) -> str:
        return self._template.render(messages, self._tools, generation_prompt=generation_prompt)


def _renamed(message: Message, names: Sequence[str]) -> Message:
    """The message with other names of its first calls."""
    calls = list(message["tool_calls"])
    for number, name in enumerate(names):
        calls[number] = {**calls[number], "function": {**calls[number]["function"], "name": name}}
    return {**message, "tool_calls": calls}


def _indent(text: str) -> int:
    """How much white space a text begins with."""
    return len(text) - len(text.lstrip())
