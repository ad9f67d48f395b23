"""Tokenizes conversations with pictures.

A picture is first a mark in the text of its message. The chat template renders the text with the marks, then the text
of the template for a picture takes the place of each mark, and then the base's processor says which tokens stand for a
picture of its size. What is trained follows the text; the tokens of a picture never are.

    "<mark>what is it?"  ->  "user: <image>what is it?"  ->  "user: <image><image><image><image>what is it?"
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from trainer.base.find.processor import read_processor
from trainer.data.format.formats import or_error
from trainer.data.format.known.pictures.sources import HELD, Picture, PictureSource, decoded
from trainer.data.format.messages import Message, read_messages
from trainer.data.format.row_format import MESSAGES
from trainer.data.format.spans import joined, without
from trainer.data.render.chat import Example, Renderer, tools_of
from trainer.data.render.chat_template import chat_template, conversation_template
from trainer.data.render.chat_text import Rendered
from trainer.data.render.document import Turn
from trainer.errors import ConfigError, DataError

PICTURE = np.dtype([("sha256", "V32"), ("height", "<u4"), ("width", "<u4"), ("begin", "<u4"), ("tokens", "<u4")])
"""A picture of a document: where its tokens begin in the document, and their number."""
# Stands for a picture until the template has rendered the text. No tokenizer or template knows this character of the
# private use area.
_MARK = "\ue0f3"
_TAG = re.compile("<image>\n?")
_BEFORE, _BEHIND = "Zq", "qZ"


@dataclass(frozen=True, eq=False)
class Pictured(Example):
    """A tokenized conversation with `places` of `PICTURE`, in their order, and the bytes of its pictures."""

    places: NDArray[np.void] = field(default_factory=lambda: np.empty(0, PICTURE))
    contents: Mapping[str, bytes] = field(default_factory=dict[str, bytes])

    @property
    def columns(self) -> Mapping[str, Any]:
        return {"pictures": len(self.places), "picture": self.places.view(np.uint8).reshape(-1, PICTURE.itemsize)}

    @property
    def pictures(self) -> Mapping[str, bytes]:
        return self.contents

    def cut(self, limit: int) -> Self:
        """Its first tokens, at most `limit`. A picture that does not fit ends the document before itself."""
        ends = self.places["begin"] + self.places["tokens"]
        if (beyond := np.flatnonzero(ends > limit)).size:
            limit = min(limit, int(self.places["begin"][beyond[0]]))
        kept = self.places[ends <= limit]
        digests = {place["sha256"].tobytes().hex() for place in kept}
        return type(self)(
            self.tokens[:limit],
            self.targets[:limit],
            self.left_out,
            kept,
            {digest: content for digest, content in self.contents.items() if digest in digests},
        )


class PictureRenderer:
    """Encodes conversations with pictures with one tokenizer, and the processor beside it.

    Raises `ConfigError` as `Renderer`, and if the base has no processor or its template writes no pictures."""

    def __init__(self, tokenizer: Any, data: Any) -> None:
        self._tokenizer, self._data = tokenizer, data
        self._chat = Renderer(tokenizer, data.model_copy(update={"format": "chat", "fields": {}}))
        self._processor = read_processor(Path(tokenizer.name_or_path), tokenizer.name_or_path, tokenizer)
        self._source = PictureSource(data.images.root)

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Pictured | DataError]:
        made = [or_error(self._expanded, row) for row in rows]
        texts = [one if isinstance(one, DataError) else one.rendered for one in made]
        return [
            example if isinstance(example, DataError) else or_error(self._with_places, {"of": one, "example": example})
            for one, example in zip(made, self._chat.encode_rendered(texts), strict=True)
        ]

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        messages, _ = self._read(row)
        turns = self._chat.turns({"messages": messages})
        return [turn._replace(content=turn.content.replace(_MARK, "<image>")) for turn in turns]

    def contents(self, row: dict[str, Any]) -> list[bytes]:
        """The bytes of the pictures of a row. Raises `DataError` if one is none."""
        return [self._source.read(one).content for one in self._read(row)[1]]

    def question(self, row: dict[str, Any]) -> tuple[list[int], Mapping[str, Any]]:
        """The tokens before an answer to a conversation, and what the base's class takes of its pictures.

        Raises `DataError`."""
        messages, given = self._read(row)
        pictures = [self._source.read(one) for one in given]
        template = conversation_template(self._tokenizer, self._data)
        text = template.render(read_messages(messages), generation_prompt=True)
        one = self._with_tokens(Rendered(text, []), pictures)
        ids = self._processor.encode(one.rendered.text)
        return ids, self._processor.inputs([decoded(picture.content) for picture in pictures], ids)

    def _expanded(self, row: dict[str, Any]) -> "_Expanded":
        """The text of a row in which the tokens of its pictures stand. Raises `DataError` if it has none."""
        messages, given = self._read(row)
        pictures = [self._source.read(one) for one in given]
        for message in messages:
            if _MARK in str(message.get("content")):
                self._check_parts(message)
        return self._with_tokens(
            self._chat.render({"messages": messages, "tools": tools_of(row, self._data)}), pictures
        )

    def _with_tokens(self, rendered: Rendered, pictures: list[Picture]) -> "_Expanded":
        """A rendered text with the tokens of `pictures` in place of their marks."""
        if rendered.text.count(_MARK) != len(pictures):
            raise DataError("the chat template leaves out or repeats a message with a picture")
        if self._processor.token in rendered.text:
            raise DataError(f"its text has {self._processor.token!r}, which stands for a picture and may not be text")
        texts = self._processor.replacements(tuple((one.height, one.width) for one in pictures)) if pictures else []
        before, behind = self._around
        ranges, ends, pieces, length = list[tuple[int, int]](), [0], list[str](), 0
        for number, piece in enumerate(rendered.text.split(_MARK)):
            if number:
                pieces += [before, texts[number - 1], behind]
                ranges.append((length + len(before), length + len(before) + len(texts[number - 1])))
                length = length + len(before) + len(texts[number - 1]) + len(behind)
                ends.append(length)
            pieces.append(piece)
            length += len(piece)
        marks = [place for place, letter in enumerate(rendered.text) if letter == _MARK]

        def moved(place: int) -> int:
            passed = int(np.searchsorted(marks, place))  # the marks before the place
            return place if not passed else ends[passed] + place - marks[passed - 1] - 1

        spans = without(joined((moved(begin), moved(end)) for begin, end in rendered.spans), ranges)
        text = Rendered("".join(pieces), spans, rendered.end_trained, rendered.left_out)
        return _Expanded(text, ranges, pictures)

    def _with_places(self, given: dict[str, Any]) -> Pictured:
        """The example with the places of the pictures' tokens, none of which is trained."""
        one, example = given["of"], given["example"]
        places = np.zeros(len(one.pictures), PICTURE)
        targets = example.targets.copy()
        if one.ranges:
            offsets = np.array(self._chat.offsets(one.rendered.text), np.int64)
            ahead = len(example.tokens) - len(offsets)  # a token that begins every text
            for number, ((begin, end), picture) in enumerate(zip(one.ranges, one.pictures, strict=True)):
                inside = np.flatnonzero((offsets[:, 1] > begin) & (offsets[:, 0] < end)) + ahead
                targets[inside] = False
                places[number] = (picture.sha256, picture.height, picture.width, inside[0], len(inside))
        contents = {picture.sha256.hex(): picture.content for picture in one.pictures}
        return Pictured(example.tokens, targets, example.left_out, places, contents)

    @cached_property
    def _around(self) -> tuple[str, str]:
        """The text that the template writes before and behind the processor's token for a picture.

        Raises `ConfigError` if the template writes a picture elsewhere than in its place."""
        parts = [{"type": "text", "text": _BEFORE}, {"type": "image"}, {"type": "text", "text": _BEHIND}]
        text = self._rendered("user", parts) or ""
        found = re.search(f"{_BEFORE}(.*?){re.escape(self._processor.token)}(.*?){_BEHIND}", text, re.DOTALL)
        if found is None:
            raise ConfigError(
                "data.template: the chat template does not write a picture where it stands in its message, which rows"
                f" with pictures need. Give one that writes {self._processor.token!r} for a part of the type image."
            )
        return found[1], found[2]

    @cached_property
    def _template(self) -> str:
        return chat_template(self._tokenizer, self._data)

    def _rendered(self, role: str, content: Any) -> str | None:
        """The text of a message alone. None if the template refuses it."""
        try:
            talk = [{"role": role, "content": content}]
            return str(self._tokenizer.apply_chat_template(talk, tokenize=False, chat_template=self._template))
        except Exception:  # a template may raise any error
            return None

    def _check_parts(self, message: Message) -> None:
        """Raises `DataError` if other programs, which give a template the parts, get another text of a message."""
        role, content = message.get("role", "user"), str(message["content"])
        parts = list[dict[str, str]]()
        for number, text in enumerate(content.split(_MARK)):
            parts += [{"type": "image"}] if number else []
            parts += [{"type": "text", "text": text}] if text else []
        before, behind = self._around
        own, theirs = self._rendered(role, content), self._rendered(role, parts)
        if None not in (own, theirs) and str(own).replace(_MARK, f"{before}{self._processor.token}{behind}") != theirs:
            raise DataError(
                "the chat template writes the text beside a picture otherwise if it gets it in parts, as other programs"
                " give it. Remove white space beside the picture"
            )

    def _read(self, row: dict[str, Any]) -> tuple[list[Message], list[Any]]:
        """The messages with marks for pictures, and the pictures in their order. Raises `DataError`."""
        name = next((name for name in self._names("messages", MESSAGES) if row.get(name) is not None), "messages")
        beside = next((row[name] for name in self._names("images", ("images", "image")) if row.get(name)), [])
        queue = list(beside) if isinstance(beside, (list, tuple)) else [beside]
        talk, pictures, asked = row.get(name), list[Any](), len(queue)
        if not isinstance(talk, list):
            raise DataError(f"no field {name!r} with a conversation (the row has: {', '.join(row)})")
        messages = [self._marked(message, turn, queue, pictures) for turn, message in enumerate(talk, 1)]
        if len(queue) == asked > 0:  # no text says where they are: before the first message of a user
            first = next((one for one in messages if one.get("role", one.get("from")) in ("user", "human")), None)
            if first is not None:
                key = "content" if "content" in first else "value"
                first[key] = _MARK * asked + str(first[key])
                pictures, queue = queue, []
        if queue:
            raise DataError(f"it has {asked} pictures, and its text has places for {asked - len(queue)}")
        return messages, pictures

    def _names(self, field_: str, others: Sequence[str]) -> Sequence[str]:
        given = self._data.fields.get(field_)
        return (given,) if given else others

    def _marked(self, message: Any, turn: int, queue: list[Any], pictures: list[Any]) -> Any:
        """A message with a mark for each of its pictures, which are added to `pictures`, from its parts or `queue`."""
        if not isinstance(message, dict):
            return message
        key = "value" if "value" in message and "content" not in message else "content"
        content = message.get(key)
        parts = content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []
        if not all(isinstance(part, dict) for part in parts):
            return message
        texts = list[str]()
        for part in parts:
            kind, text = part.get("type"), part.get("text")
            if kind in ("image", "image_url"):
                pictures.append(part if any(part.get(name) for name in HELD) else self._next(queue, turn))
                texts.append(_MARK)
            elif kind == "text" and isinstance(text, str):
                if _MARK in text:
                    raise DataError(f"turn {turn} has a character of Unicode's private use area, U+E0F3")
                pieces = _TAG.split(text) if queue else [text]
                pictures += [self._next(queue, turn) for _ in pieces[1:]]
                texts.append(_MARK.join(pieces))
            else:
                return message  # whose error reading the messages gives
        return {**message, key: "".join(texts)} if parts else message

    def _next(self, queue: list[Any], turn: int) -> Any:
        if not queue:
            raise DataError(f"turn {turn} has a place for a picture, and the row has no more pictures")
        return queue.pop(0)


@dataclass(frozen=True)
class _Expanded:
    """A rendered row: its text with the tokens of its pictures, which stand at `ranges`."""

    rendered: Rendered
    ranges: list[tuple[int, int]]
    pictures: list[Picture]
