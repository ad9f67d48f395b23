"""The thinking of models that reason: a block of text before an answer, in `reasoning_content` or between tags in the content.

Chat templates write the block of the last turn, and mostly drop those of earlier ones, where no model sees them when it answers.
"""

import re
from collections.abc import Callable, Iterator

from trainer.data.format.messages import Message
from trainer.data.render.spans import Span

OPEN, CLOSE = "<think>", "</think>"
_KEYS = ("reasoning_content", "reasoning", "thinking")
_BEFORE_ANSWER = re.compile(rf"\s*{OPEN}(.*?){CLOSE}\s*", re.DOTALL)
_BLOCK = re.compile(rf"{OPEN}.*?{CLOSE}\s*", re.DOTALL)
# Templates look for the tags in a content and cut there. These stand for them until the text is made: as long as the tags, so that
# places stay what they are, of characters of the private use area, which nothing else has.
_HIDDEN = {OPEN: "\ue0f0" * len(OPEN), CLOSE: "\ue0f1" * len(CLOSE)}
_MARK = "\ue0f2"


def without_thinking(message: Message) -> Message:
    """The message with its answer alone."""
    if message["role"] != "assistant":
        return message
    rest = {key: value for key, value in message.items() if key not in _KEYS}
    return {
        **rest,
        "content": _BEFORE_ANSWER.sub("", message["content"], count=1) if _thought(message) else message["content"],
    }


def with_hidden_thinking(messages: list[Message], render: Callable[[list[Message]], str]) -> list[Message]:
    """The messages, where those whose thinking the template drops have it in their content, which the template does not see through.

    `render` makes a text of messages. What is thought may stand in the answer too, so a mark in its place shows what is dropped.
    """
    marks = {
        turn: f"{_MARK}{turn}{_MARK}"
        for turn, message in enumerate(messages)
        if message["role"] == "assistant" and _thought(message)
    }
    if not marks:
        return messages
    text = render([_thinking(message, marks.get(turn)) for turn, message in enumerate(messages)])
    dropped = {turn for turn, mark in marks.items() if mark not in text}
    return [_hidden(message) if turn in dropped else message for turn, message in enumerate(messages)]


def _thinking(message: Message, thought: str | None) -> Message:
    """The message with another thought; as it is where there is none."""
    if thought is None:
        return message
    keys = {key: thought for key in _KEYS if isinstance(message.get(key), str)}
    content, within = message["content"], _BEFORE_ANSWER.match(message["content"])
    return {
        **message,
        **keys,
        "content": content[: within.start(1)] + thought + content[within.end(1) :] if within else content,
    }


def _hidden(message: Message) -> Message:
    answer = without_thinking(message)
    return {
        **answer,
        "content": f"{_HIDDEN[OPEN]}\n{_thought(message)}\n{_HIDDEN[CLOSE]}\n\n{answer['content']}",
    }


def shown_again(text: str) -> str:
    """A text made of messages with hidden thinking."""
    for tag, hidden in _HIDDEN.items():
        text = text.replace(hidden, tag)
    return text


def blocks(text: str) -> Iterator[Span]:
    """The characters of each block of thinking, with its tags and the white space behind it."""
    return (match.span() for match in _BLOCK.finditer(text))


def _thought(message: Message) -> str | None:
    """What is thought, by key or between tags at the beginning of the content, without white space around it."""
    by_key = next((message[key] for key in _KEYS if isinstance(message.get(key), str)), None)
    within = _BEFORE_ANSWER.match(message["content"])
    return (by_key or (within[1] if within else "")).strip() or None
