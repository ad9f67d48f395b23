"""Finds parts of a conversation that its rendered text lacks. A chat template may ignore what it does not know."""

import json
import re
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any

from trainer.data.format.messages import Message, own_keys

END_OF_TURN = "end of turn"
"""The name of an end that the template does not write behind an assistant's turn, so that none is trained. Behind it
may stand the tag that begins the next turn."""
_WORD = re.compile(r"\w+")
# A text is recognised by its first so many words, or by so many letters of a long word. Any characters that belong to
# no word may stand between the words.
_WORDS, _LONG_WORD = 20, 100
# JSON writes a line break as \n. Both characters of such an escape become white space, so that no place moves.
_ESCAPE = re.compile(r"\\[a-z]")


def left_out(given: list[dict[str, Any]], messages: list[Message], text: str) -> list[str]:
    """The parts that `text` lacks, each named once: `tool_calls`, another key of a message, or the content of a role.

    `given` are the row's own messages, and `messages` their converted form. A part counts as present if its words stand
    after the message before, with any characters between them: templates trim text, and write some of it as JSON.
    """
    missing: dict[str, None] = {}
    rendered = _Rendered(text)
    begin = 0
    for raw, message in zip(given, messages, strict=True):
        end = begin
        for what, piece in _pieces(raw, message):
            if what in missing:
                continue
            place = rendered.end_of(piece, begin)
            if place is None and what.startswith("content"):
                place = rendered.end_of(piece, 0)  # a template may move a system message
            if place is None:
                missing[what] = None
            else:
                end = max(end, place)
        begin = end
    return list(missing)


def left_out_in_words(name: str) -> str:
    """The name of a part that is left out, in words for the user."""
    if not name.startswith(END_OF_TURN):
        return name
    what = "the end of the assistant's turns, for which the template writes no token"
    if tag := name.removeprefix(END_OF_TURN).strip():
        return (
            f"{what} but the next turn's {tag}, so that the model does not learn to stop (set data.template to a copy"
            f" of the template that writes {tag} behind the last answer, too, or set data.train_on.end to false)"
        )
    return (
        f"{what}, so that the model does not learn to stop (set data.template to a template that writes one, name its"
        " text in model.add_tokens, or set data.train_on.end to false)"
    )


def _pieces(raw: dict[str, Any], message: Message) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each part of a message."""
    yield f"content of {message['role']}", message["content"].strip()
    for call in message.get("tool_calls") or []:
        name, arguments = call["function"].get("name"), call["function"]["arguments"]
        yield from (
            ("tool_calls", text) for text in strings_of([name, list(arguments) if isinstance(arguments, dict) else []])
        )
    own = own_keys(raw)
    for key in (key for key in raw if key not in own):
        yield from ((key, piece.strip()) for piece in strings_of(raw[key]))


def strings_of(value: Any) -> Iterator[str]:
    """Yield all strings in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_of(item)


class _Rendered:
    """The rendered text of a conversation, in which pieces are searched."""

    def __init__(self, text: str) -> None:
        self._text = text

    @cached_property
    def _plain(self) -> str:
        return _ESCAPE.sub("  ", self._text)

    def end_of(self, piece: str, begin: int) -> int | None:
        """The end of `piece` in the text from `begin` on, or of enough of its words. None if it is not there."""
        for written in (piece, json.dumps(piece, ensure_ascii=False)[1:-1]):
            place = self._text.find(written, begin)
            if place >= 0:
                return place + len(written)
        words = list[str]()
        for found in islice(_WORD.finditer(_ESCAPE.sub("  ", piece)), _WORDS):
            words.append(found[0][:_LONG_WORD])
            if len(found[0]) > _LONG_WORD:
                break
        # A gap between two words can match in one way only, so a search takes one pass over the text.
        match = re.compile(r"\W+".join(words)).search(self._plain, begin) if words else None
        return match and match.end()
