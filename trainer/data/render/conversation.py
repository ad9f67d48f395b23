"""One conversation rendered by a chat template: its text, and the place of each turn in it.

Usually the text of the first turns is a prefix of the whole text. Then a turn reaches from the end of the generation
prompt to the end of that prefix. Some templates break this rule: those of reasoning models drop the thinking of earlier
turns, and others move the system message to the last question. For these Capstan renders the conversation again with
another content in the place of the turn. The difference, and the end of the turn before, give the place.
"""

import re
from collections.abc import Mapping, Sequence

from trainer.data.format.messages import UNTRAINED, Message
from trainer.data.format.spans import Span, shared_beginning
from trainer.data.render.chat_template import ChatTemplate, Tools
from trainer.data.render.thinking import OPEN
from trainer.errors import DataError

# Finding a turn renders everything before it, twice. These limits on messages and characters hold for all turns of one
# row together. They allow about five seconds of work: some 1,000 turns, of which every second one is the assistant's.
_MOST_MESSAGES, _MOST_CHARACTERS = 2**19, 2**30
# Replaces the content of a turn. No tokenizer or template knows this character of the private use area.
_MARK = "\ue0ff"


class Misplaced(DataError):
    """The place of a turn in the whole text does not follow from the text up to it."""


class Conversation:
    """One conversation: its text `whole`, and the texts of its beginnings.

    `ends` matches the tokenizer's special tokens, which may end a turn. Raises `DataError` if the template refuses the
    conversation."""

    def __init__(self, template: ChatTemplate, ends: re.Pattern[str], messages: list[Message], tools: Tools) -> None:
        self._template, self._tools = template, tools
        self._ends, self.messages = ends, messages
        self._contents: dict[int, Span | None] = {}
        self.whole = self.render(len(messages))

    def render(self, count: int, generation_prompt: bool = False) -> str:
        """The text of the first `count` messages."""
        return self._text(self.messages[:count], generation_prompt)

    def check_size(self, turns: Sequence[int]) -> None:
        """Raises `DataError` if finding these turns in the whole text would take very long."""
        messages, most = sum(2 * turn + 1 for turn in turns), _MOST_MESSAGES
        if messages > most or messages * len(self.whole) > _MOST_CHARACTERS * len(self.messages):
            raise DataError(
                f"{len(self.messages):,} turns of {len(self.whole):,} characters are too long to find {len(turns):,} of"
                " them in the text; split the conversation, give data.template a template with {% generation %}"
                " tags, or set data.train_on.turns: last or data.train_on.roles: all"
            )

    def ignores_tools(self) -> bool:
        """Whether the text would be the same without tools."""
        try:
            return self._template.render(self.messages) == self.whole
        except DataError:
            return False

    def prefix(self, count: int, generation_prompt: bool = False) -> int:
        """The length of the text of the first `count` messages, which must be a prefix of the whole text."""
        if count == 0:
            return 0
        if count == len(self.messages):
            return len(self.whole)
        prefix = self.render(count, generation_prompt)
        if not self.whole.startswith(prefix):
            turn = count + 1 if generation_prompt else count
            raise Misplaced(
                f"turn {turn}: what the chat template makes of the conversation up to it is not how the whole begins,"
                " so its place is unknown; give data.template a template with {% generation %} tags, or set"
                " data.train_on.roles: all"
            )
        return len(prefix)

    def vanished(self, turns: Sequence[int]) -> tuple[int, str] | None:
        """The first of these turns whose content or calls the template leaves out, and which of the two it is.

        None if the template writes all of them.
        """
        others, marks = dict[int, Message](), dict[str, tuple[int, int | None]]()
        for turn in turns:
            message = self.messages[turn]
            names = {f"{_MARK}{turn}.{number}{_MARK}": number for number in range(len(message.get("tool_calls") or []))}
            if names:
                message = _renamed(message, list(names))
            if message["content"].strip():
                mark = f"{_MARK}{turn}{_MARK}"  # at the end, because templates drop thinking from the beginning
                message = {**message, "content": message["content"] + mark}
                marks[mark] = turn, None
            marks |= {name: (turn, number) for name, number in names.items()}
            others[turn] = message
        try:
            text = self.with_all(others) if marks else ""
        except DataError:  # the template may inspect a content and refuse this one
            return None
        for mark, (turn, number) in marks.items():
            if mark not in text and (number is None or self._is_same_without(turn, number)):
                return turn, "content" if number is None else "calls"
        return None

    def _is_same_without(self, turn: int, number: int) -> bool:
        """Whether the text would be the same without a call. Some templates write its arguments but not its name."""
        message = self.messages[turn]
        calls = [call for index, call in enumerate(message["tool_calls"]) if index != number]
        rest = {key: value for key, value in message.items() if key != "tool_calls"}
        try:
            return self._with(turn, {**rest, "tool_calls": calls} if calls else rest) == self.whole
        except DataError:
            return False

    def written(self, turn: int) -> list[Span]:
        """The characters of the whole text that the model writes in an assistant's turn, and white space after its end.

        They are several spans if the template puts something else between a turn's calls and its words.

        Raises:
            DataError: the place of the turn cannot be determined.
        """
        if turn == 0:
            raise DataError(
                "turn 1 is the assistant's, so where it begins is unknown; "
                "begin with another turn, or give data.template a template with {% generation %} tags"
            )
        try:
            return [(self.prefix(turn, generation_prompt=True), self.prefix(turn + 1))]
        except Misplaced as error:
            anchor = self.anchor(turn)
            if anchor is None:
                raise
            span = self._begin(turn, anchor, error), self._end(turn)
            if self._is_alone(turn, span):
                return [span]
            return self._apart(turn, error)

    def said(self, turn: int) -> Span:
        """The characters of the content of a message of another role, with the end of its turn."""
        content = self.content(turn)
        if content is None:
            raise Misplaced(f"turn {turn + 1}: its content is not found in the conversation's text")
        begin, end = content
        try:
            return begin, max(end, self.prefix(turn + 1))
        except Misplaced:
            return begin, end

    def place(self, turn: int) -> list[Span]:
        """The characters of a whole turn, or of the part whose place can be determined."""
        try:
            return [(self.prefix(turn), self.prefix(turn + 1))]
        except Misplaced:
            return self.written(turn) if self.messages[turn]["role"] == "assistant" else [self.said(turn)]

    def silent(self, turn: int) -> list[Span]:
        """The characters of a turn's content that its row leaves untrained.

        Raises:
            DataError: the template rewrites the content, so their places are unknown.
        """
        message = self.messages[turn]
        if UNTRAINED not in message:
            return []
        content, place = message["content"], self.content(turn)
        text = self.whole[slice(*place)] if place else ""
        if not place or content.strip() != text.strip():
            raise DataError(
                f"turn {turn + 1}: the chat template rewrites its content, so which characters are not to be trained is"
                " unknown; give the turn a weight as a whole"
            )
        begin = place[0] + _indent(text) - _indent(content)
        found = ((max(place[0], begin + start), min(place[1], begin + end)) for start, end in message[UNTRAINED])
        return [(start, end) for start, end in found if start < end]

    def marked(self, turn: int, message: Message, mark: str) -> Span | None:
        """The characters that `mark` replaces if `message` is the turn's message. None if they cannot be determined."""
        before, found, after = self._with(turn, message).partition(mark)
        if not found or not self.whole.endswith(after):
            return None
        # Templates write a line break between a content and a call. With an empty content that is the line break before
        # the call.
        begin = shared_beginning(before, self.whole)
        return begin, max(begin, len(self.whole) - len(after))

    def anchor(self, turn: int) -> int | None:
        """The beginning of a turn's words, or of the name of its first call if it has no words.

        None if it cannot be determined.
        """
        message = self.messages[turn]
        if message["content"].strip() or not message.get("tool_calls"):
            content = self.content(turn)
            return content and content[0]
        before, mark, _ = self._with(turn, _renamed(message, [_MARK])).partition(_MARK)
        return len(before) if mark and self.whole.startswith(before) else None

    def content(self, turn: int) -> Span | None:
        """The characters that change if the turn gets another content. None if they cannot be determined."""
        if turn not in self._contents:
            self._contents[turn] = self.marked(turn, {**self.messages[turn], "content": _MARK}, _MARK)
        return self._contents[turn]

    def _begin(self, turn: int, anchor: int, otherwise: Misplaced) -> int:
        """The end of the generation prompt of a turn whose words or calls begin at `anchor`.

        The prompt follows the end of the turn before, if that end is known. Otherwise it is the last prompt before the
        anchor. A prompt that opens a block of thinking may stand there without that opening.
        """
        before = self.content(turn - 1)
        if before is not None:
            marked = [*self.messages[: turn - 1], {**self.messages[turn - 1], "content": _MARK}]
            behind = self._text(marked, True).partition(_MARK)[2]
            for one in (behind, behind.partition(OPEN)[0]):
                if one and self.whole.startswith(one, before[1]) and before[1] + len(one) <= anchor:
                    return before[1] + len(one)
        prompted = self.render(turn, generation_prompt=True)
        prompt = prompted[shared_beginning(prompted, self.render(turn)) :]
        sought = {prompt, prompt.partition(OPEN)[0]} - {""}
        places = [(place, len(one)) for one in sought if (place := self.whole.rfind(one, 0, anchor)) >= 0]
        if places and self._is_alone(turn, (sum(max(places)), anchor)):
            return sum(max(places))  # the longer of two at the same place
        if self._goes_on(turn, anchor):
            return anchor
        raise otherwise

    def _goes_on(self, turn: int, anchor: int) -> bool:
        """Whether a turn continues directly after the words of an earlier assistant's turn whose calls got results."""
        for earlier in reversed(range(turn)):
            content = self.content(earlier)
            if self.messages[earlier]["role"] not in ("assistant", "tool"):
                return False
            if content is not None and content[0] < content[1] == anchor:
                return True
        return False

    def _end(self, turn: int) -> int:
        """The end of a turn's words and calls, including the token that ends it if one follows."""
        message = self.messages[turn]
        content = self.content(turn)
        if content is not None and (message["content"].strip() or not message.get("tool_calls")):
            marked, begin = {**message, "content": _MARK}, content[1]
        else:
            marked, begin = _renamed(message, [_MARK]), self.anchor(turn) or 0
            begin += len(message["tool_calls"][0]["function"].get("name") or "")
        behind = self._text([*self.messages[:turn], marked]).partition(_MARK)[2]
        if (written := behind.rstrip()) and self.whole.startswith(written, begin):
            return begin + len(written)
        calls = re.sub(rf"\s*(?:{self._ends.pattern})?\s*\Z", "", behind)
        end = begin + len(calls) if self.whole.startswith(calls, begin) else begin
        closing = behind[len(calls) :].strip()
        own = self._template.end.removesuffix(closing).rstrip()
        if own and calls.endswith(own) and self._template.behind_an_answer.lstrip().startswith(own):
            return end  # `closing` ends a conversation, not a turn
        # If the last turn of a conversation has no end token, the token that follows here begins the next turn.
        match = re.compile(rf"\s*(?:{self._ends.pattern})").match(self.whole, end) if closing else None
        return match.end() if match else end

    def _is_alone(self, turn: int, span: Span) -> bool:
        """Whether the span of a turn overlaps neither the content of the turn before it nor that of the turn after."""
        before = self.content(turn - 1)
        behind = self.content(turn + 1) if turn + 1 < len(self.messages) else None
        return not ((before and span[0] < before[1]) or (behind and behind[0] < min(behind[1], span[1])))

    def _apart(self, turn: int, otherwise: Misplaced) -> list[Span]:
        """The spans of a turn whose words stand after the results of its calls."""
        message, words = self.messages[turn], self.content(turn)
        if not message.get("tool_calls") or words is None:
            raise otherwise
        silent = [*self.messages[:turn], {**message, "content": ""}, *self.messages[turn + 1 :]]
        without = Conversation(self._template, self._ends, silent, self._tools)
        calls = without.written(turn)
        if not calls or calls[-1][1] > shared_beginning(without.whole, self.whole):
            raise otherwise
        return [*calls, (words[0], self._end(turn))]

    def with_all(self, others: Mapping[int, Message]) -> str:
        """The text of the whole conversation with some messages replaced, by turn."""
        return self._text([others.get(turn, message) for turn, message in enumerate(self.messages)])

    def enclosed(self) -> list[Span]:
        """The characters between the template's {% generation %} tags."""
        return self._template.enclosed(self.messages, self._tools)

    def _with(self, turn: int, message: Message) -> str:
        """The text of the whole conversation with one message replaced."""
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
    """The length of the white space at the beginning of a text."""
    return len(text) - len(text.lstrip())
