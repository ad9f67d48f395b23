"""Finds what a conversation carries and its rendered text does not contain: a chat template may ignore what it does not
know.
"""

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
# A text is recognised by so many of its words, or by so many letters of a long word. Anything may stand between the
# words.
_WORDS, _LONG_WORD = 20, 100
# JSON writes a line break as \n. Both are two characters of white space here, so that places stay what they are.
_ESCAPE = re.compile(r"\\[a-z]")


def left_out(given: list[dict[str, Any]], messages: list[Message], text: str) -> list[str]:
    """Each thing that `text` lacks, once: `tool_calls`, another key of a message, or the content of a role.

    `given` are the row's own messages, and `messages` what became of them. A thing is there when it stands after the
    message before, as it is or with other characters between its words: templates trim text, and write some of it as
    JSON.
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
                place = rendered.end_of(piece, 0)  # a system message may move to another place
            if place is None:
                missing[what] = None
            else:
                end = max(end, place)
        begin = end
    return list(missing)


def in_words(name: str) -> str:
    """The parts that are left out, in words for people."""
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
    """The texts that a message carries, each after its name."""
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
    """The texts in a value of JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings_of(item)


class _Rendered:
    """The text of a conversation, in which pieces are searched."""

    def __init__(self, text: str) -> None:
        self._text = text

    @cached_property
    def _plain(self) -> str:
        return _ESCAPE.sub("  ", self._text)

    def end_of(self, piece: str, begin: int) -> int | None:
        """Where `piece`, or enough of it to know it by, ends in the text from `begin` on."""
        for written in (piece, json.dumps(piece, ensure_ascii=False)[1:-1]):
            place = self._text.find(written, begin)
            if place >= 0:
                return place + len(written)
        words = list[str]()
        for found in islice(_WORD.finditer(_ESCAPE.sub("  ", piece)), _WORDS):
            words.append(found[0][:_LONG_WORD])
            if len(found[0]) > _LONG_WORD:
                break
        # A gap between words begins and ends where the words do, in one way only: a search takes one pass over the
        # text.
        match = re.compile(r"\W+".join(words)).search(self._plain, begin) if words else None
        return match and match.end()
