"""Finds what a conversation carries and its rendered text does not contain: a chat template may ignore what it does not know."""

import json
import re
from collections.abc import Iterator
from typing import Any

from trainer.data.messages import Message

_WORD = re.compile(r"\w+")
# So many words are enough to know a text by. Between them may be anything but words; JSON writes a line break as \n.
_WORDS = 20
_BETWEEN = r"(?:\W|\\[a-z])+"
# A weight is no text, and the others are looked at by themselves.
_OWN = {"role", "content", "tool_calls", "weight", "from", "value"}


def left_out(given: list[dict[str, Any]], messages: list[Message], text: str) -> list[str]:
    """Each thing that `text` lacks, once: `tool_calls`, another key of a message, or the content of a role.

    `given` are the row's own messages, and `messages` what became of them. A thing is there when it stands after the
    message before, as it is or with other characters between its words: templates trim text, and write some of it as JSON.
    """
    missing: dict[str, None] = {}
    begin = 0
    for raw, message in zip(given, messages, strict=True):
        end = begin
        for what, piece in _pieces(raw, message):
            if what in missing:
                continue
            place = _end_of(piece, text, begin)
            if place is None and what.startswith("content"):
                place = _end_of(piece, text, 0)  # a system message may move to another place
            if place is None:
                missing[what] = None
            else:
                end = max(end, place)
        begin = end
    return list(missing)


def _pieces(raw: dict[str, Any], message: Message) -> Iterator[tuple[str, str]]:
    """The texts that a message carries, each after its name."""
    yield f"content of {message['role']}", message["content"].strip()
    for call in message.get("tool_calls") or []:
        name, arguments = call["function"].get("name"), call["function"]["arguments"]
        yield from (
            ("tool_calls", text) for text in _strings([name, list(arguments) if isinstance(arguments, dict) else []])
        )
    for key in (key for key in raw if key not in _OWN):
        yield from ((key, piece.strip()) for piece in _strings(raw[key]))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _end_of(piece: str, text: str, begin: int) -> int | None:
    """Where `piece`, or enough of it to know it by, ends in the text from `begin` on."""
    for written in (piece, json.dumps(piece, ensure_ascii=False)[1:-1]):
        place = text.find(written, begin)
        if place >= 0:
            return place + len(written)
    words = _WORD.findall(piece)[:_WORDS]
    match = re.compile(_BETWEEN.join(words)).search(text, begin) if words else None
    return match and match.end()
