"""One conversation in a chat template: its text, and where in it a turn lies.

A turn reaches from the end of the generation prompt to the end of its text, as the text of the conversation up to there begins the
whole. Templates of models that reason do not keep to that: they drop what earlier turns thought. There a turn is found by rendering
the conversation once more with another content in its place.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from trainer.data.messages import Message, text_of
from trainer.data.spans import Span
from trainer.data.thinking import OPEN, shown_again
from trainer.errors import ConfigError, DataError
from trainer.time_limit import OutOfTime, time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Finding a turn renders all that is before it, twice. For the turns of one row together, these are the most messages and
# characters, some five seconds' work: about 1,000 turns of which every second one is the assistant's.
_MOST_MESSAGES, _MOST_CHARACTERS = 2**19, 2**30
RENDER_SECONDS = 30.0
"""A template renders a conversation in milliseconds; one that has not ended by now never will."""
# Stands for the content of a turn. No tokenizer or template knows this character of the private use area.
_MARK = "\ue0ff"


class Misplaced(DataError):
    """The place of a turn in the whole text cannot be told by the text up to it."""


class Conversation:
    """One conversation, whose beginnings are rendered too. `ends` matches the tokenizer's special tokens, which may end a turn."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: str,
        ends: re.Pattern[str],
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._options: dict[str, Any] = {"chat_template": template, "tools": tools}
        self._ends, self._messages = ends, messages
        self._contents: dict[int, Span | None] = {}

    def render(self, count: int, generation_prompt: bool = False) -> str:
        """The text of the first `count` messages."""
        return self._text(self._messages[:count], add_generation_prompt=generation_prompt)

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
            return self._text(self._messages, add_generation_prompt=False, tools=None) == whole
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

    def written(self, turn: int, whole: str) -> Span:
        """The characters of the whole text that the model has to write in an assistant's turn, with white space behind its end.

        Raises:
            DataError: the place of the turn cannot be told.
        """
        if turn == 0:
            raise DataError(
                "turn 1 is the assistant's, so where it begins is unknown; "
                "begin with another turn, or give data.template a template with {% generation %} tags"
            )
        try:
            return self.prefix(turn, whole, generation_prompt=True), self.prefix(turn + 1, whole)
        except Misplaced as error:
            content = self._content(turn, whole)
            if content is None:
                raise
            span = self._after_generation_prompt(turn, whole, content[0], error), self._end_of_turn(whole, content[1])
            self._check_alone(turn, whole, span, error)
            return span

    def said(self, turn: int, whole: str) -> Span:
        """The characters of the whole text that a message of another role has as its content, and the end of its turn."""
        content = self._content(turn, whole)
        if content is None:
            raise Misplaced(f"turn {turn + 1}: its content is not found in the conversation's text")
        begin, end = content
        try:
            return begin, max(end, self.prefix(turn + 1, whole))
        except Misplaced:
            return begin, end

    def place(self, turn: int, whole: str) -> Span:
        """The characters of a whole turn, or of as much of it as can be told."""
        try:
            return self.prefix(turn, whole), self.prefix(turn + 1, whole)
        except Misplaced:
            return self.written(turn, whole) if self._messages[turn]["role"] == "assistant" else self.said(turn, whole)

    def _content(self, turn: int, whole: str) -> Span | None:
        """The characters in which the text differs once the content of the turn is another; None where that cannot be told."""
        if turn not in self._contents:
            self._contents[turn] = self._find_content(turn, whole)
        return self._contents[turn]

    def _find_content(self, turn: int, whole: str) -> Span | None:
        marked = {**self._messages[turn], "content": _MARK}
        text = self._text([*self._messages[:turn], marked, *self._messages[turn + 1 :]], add_generation_prompt=False)
        before, mark, after = text.partition(_MARK)
        if not mark or _MARK in after or not whole.endswith(after):
            return None
        # Templates write a line break between a content and a call; of an empty content that would be the one before the call.
        begin = _shared(before, whole)
        return begin, max(begin, len(whole) - len(after))

    def _after_generation_prompt(self, turn: int, whole: str, begin: int, otherwise: Misplaced) -> int:
        """The place behind the last generation prompt before `begin`; one that opens a block of thinking may be there without it."""
        prompted = self.render(turn, generation_prompt=True)
        prompt = prompted[_shared(prompted, self.render(turn)) :]
        sought = {prompt, prompt.partition(OPEN)[0]} - {""}
        places = [(place, len(one)) for one in sought if (place := whole.rfind(one, 0, begin)) >= 0]
        if not places:
            raise otherwise
        return sum(max(places))  # of two at one place the longer

    def _check_alone(self, turn: int, whole: str, span: Span, otherwise: Misplaced) -> None:
        """Raises `otherwise` where the span of a turn reaches over the content of the turn before it, or of the one behind it."""
        before = self._content(turn - 1, whole)
        behind = self._content(turn + 1, whole) if turn + 1 < len(self._messages) else None
        if (before and span[0] < before[1]) or (behind and behind[0] < behind[1] <= span[1]):
            raise otherwise

    def _end_of_turn(self, whole: str, end: int) -> int:
        match = self._ends.search(whole, end)
        return match.end() if match else end

    def _text(self, messages: list[Message], **options: Any) -> str:
        return shown_again(text_of(self._apply(messages, tokenize=False, **options), "conversation's text"))

    def tagged(self) -> Mapping[str, Any]:
        """The tokens as transformers makes them of a template with tags: `input_ids`, `offset_mapping` and `assistant_masks`."""
        return self._apply(
            self._messages,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )

    def _apply(self, messages: list[Message], **options: Any) -> Any:
        try:
            with time_limit(RENDER_SECONDS):
                return self._tokenizer.apply_chat_template(messages, **(self._options | options))
        except OutOfTime as error:
            raise endless_template(f"a conversation of {len(messages):,} messages") from error
        except Exception as error:  # a template is a program of the user's: it may raise anything
            raise DataError(f"the chat template refuses the conversation: {error}") from error


def endless_template(what: str) -> ConfigError:
    return ConfigError(
        f"data.template: the chat template has not rendered {what} within {RENDER_SECONDS:.0f} seconds. It seems to loop without an end; "
        "correct the template of the base, or give another one."
    )


def _shared(one: str, other: str) -> int:
    """How many characters both begin with."""
    return sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(one, other, strict=False)))
