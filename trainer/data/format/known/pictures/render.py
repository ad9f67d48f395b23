"""Tokenizes conversations with pictures.

A picture is first a mark in the text of its message, one character that no other picture of the rows has. The chat
template renders the text with the marks, then the text of the template for a picture takes the place of each mark, and
then the base's processor says which tokens stand for a picture of its size. What is trained follows the text; the
tokens of a picture never are. The same holds for files of other modalities, such as video.

    "<mark>what is it?"  ->  "user: <image>what is it?"  ->  "user: <image><image><image><image>what is it?"
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.base.find.check import check_mixture, check_taken
from trainer.base.find.media import Modality, Shown, modalities
from trainer.base.find.processor import read_processor
from trainer.data.dataset.pictures import PICTURE, Placed, apart
from trainer.data.format.formats import or_error
from trainer.data.format.known.pictures.sources import Picture, PictureSource, pictured
from trainer.data.format.messages import Message, read_messages
from trainer.data.format.pictures import files_beside, names_of
from trainer.data.format.row_format import MESSAGES
from trainer.data.format.spans import joined, without
from trainer.data.render.chat import Example, Renderer, tools_of
from trainer.data.render.chat_template import chat_template, conversation_template
from trainer.data.render.chat_text import Rendered
from trainer.data.render.document import Turn, pictures_of_rows
from trainer.data.render.numbered import length_without_padding
from trainer.errors import ConfigError, DataError, counted
from trainer.servers import Pictured

# The marks are the characters of two private use planes, which no tokenizer or template knows.
_FIRST_MARK, _MOST_MARKS = 0xF0000, 0x1FFFE
_MARK = re.compile(f"[{chr(_FIRST_MARK)}-{chr(_FIRST_MARK + _MOST_MARKS)}]")
_BEFORE, _BEHIND = "Zq", "qZ"


class PictureRenderer:
    """Encodes conversations with pictures with one tokenizer, and the processor beside it.

    `data` has the settings for conversations. If they have no answers, they are read whole, and what is trained stands
    behind them. Raises `ConfigError` as `Renderer`, and if the base has no processor or its template writes no
    pictures."""

    def __init__(self, tokenizer: Any, data: Any, *, has_answers: bool = True) -> None:
        self._tokenizer, self._data, self._has_answers = tokenizer, data, has_answers
        self._chat = Renderer(tokenizer, data.model_copy(update={"format": "chat", "fields": {}}))
        self._processor = read_processor(Path(tokenizer.name_or_path), tokenizer.name_or_path, tokenizer)
        self._source = PictureSource(data, self._processor.made)
        self._checked = {self._processor.takes[0]}
        self._mixed = set[tuple[Modality, ...]]()
        self._arounds = dict[str, tuple[str, str]]()
        self.marks = Marks()

    def encode(self, rows: Sequence[dict[str, Any]]) -> list[Example | DataError]:
        self.marks = Marks()
        return self.encode_marked([or_error(self._conversation, row) for row in rows])

    def encode_marked(self, rows: Sequence[dict[str, Any] | DataError]) -> list[Example | DataError]:
        """Encode conversations in which `marks` stand for pictures."""
        made = [row if isinstance(row, DataError) else or_error(self._expanded, row) for row in rows]
        texts = [one if isinstance(one, DataError) else one.rendered for one in made]
        return [
            example if isinstance(example, DataError) else or_error(self._with_places, {"of": one, "example": example})
            for one, example in zip(made, self._chat.encode_rendered(texts), strict=True)
        ]

    @property
    def reads_prompts(self) -> bool:
        """Whether the base's class must also be told of a text without pictures what is before its answer."""
        return self._processor.reads_prompts

    def turns(self, row: dict[str, Any]) -> list[Turn]:
        return in_words(self.turns_of_marked(self._conversation(row)), self.marks)

    def turns_of_marked(self, row: dict[str, Any]) -> list[Turn]:
        return self._chat.turns(row)

    def contents(self, row: dict[str, Any]) -> list[bytes]:
        """The bytes of the pictures of a row. Raises `DataError` if one is none."""
        self.marks = Marks()
        self._conversation(row)
        return self.bytes_of(self.marks)

    def bytes_of(self, marks: "Marks") -> list[bytes]:
        return [self._source.read(*given).content for given in marks.given]

    def _conversation(self, row: dict[str, Any]) -> dict[str, Any]:
        """The messages of a row, with marks for its pictures, and its tools. Raises `DataError`."""
        return {"messages": talk_of(row, self._data.fields, self.marks), "tools": tools_of(row, self._data)}

    def question(self, row: dict[str, Any]) -> tuple[list[int], Mapping[str, Any]]:
        """The tokens before an answer to a conversation, and what the base's class takes of its pictures.

        Raises `DataError`."""
        one, files = self._asked(row)
        return self._taken(self._processor.encode(one.rendered.text), files)

    def judged(self, row: dict[str, Any]) -> tuple[list[int], Mapping[str, Any]]:
        """The tokens of a conversation to its end, which an objective's head reads, and what the class takes of its
        pictures. Raises `DataError`."""
        one, files = self._asked(row, answers=False)
        ids = self._processor.encode(one.rendered.text)
        return self._taken(ids[: length_without_padding(ids, self._tokenizer)], files)

    def _taken(self, ids: list[int], files: Sequence[Shown]) -> tuple[list[int], Mapping[str, Any]]:
        return ids, self._processor.inputs(files, ids) if files else self._processor.token_types(ids)

    def served(self, row: dict[str, Any]) -> Pictured:
        """The same question as a server is asked it. Raises `DataError`."""
        one, files = self._asked(row)
        text, offsets = one.rendered.text, np.array(self._chat.offsets(one.rendered.text), np.int64)
        inside = [np.flatnonzero((offsets[:, 1] > begin) & (offsets[:, 0] < end)) for begin, end in one.ranges]
        ends = [0, *(end for _, end in one.ranges)]
        begins = [*(begin for begin, _ in one.ranges), len(text)]
        texts = [text[end:begin] for end, begin in zip(ends, begins, strict=True)]
        spans = [range(int(places[0]), int(places[-1]) + 1) for places in inside]
        return pictured(self._processor.encode(text), spans, texts, files, self._processor)

    def _asked(self, row: dict[str, Any], *, answers: bool = True) -> "tuple[_Expanded, list[Shown]]":
        """The text before an answer to a conversation, and its pictures. Without `answers` the text of the conversation
        alone. The fields of `row` have the format's own names. Raises `DataError`."""
        self.marks = Marks()
        messages = talk_of(row, {}, self.marks)
        template = conversation_template(self._tokenizer, self._data)
        text = template.render(read_messages(messages), generation_prompt=answers)
        given = [self.marks.picture(mark) for mark in _MARK.findall(text)]
        for modality, _ in given:
            self._processor.stand(modality)
        pictures = [self._source.read(*one) for one in given]
        processor = self._processor.made
        files = [one.shape.modality.shown(one.content, one.shape, processor) for one in pictures]
        return self._with_tokens(Rendered(text, []), pictures), files

    def _expanded(self, row: dict[str, Any]) -> "_Expanded":
        """The text of a marked row in which the tokens of its pictures stand. Raises `DataError` if it has none."""
        marks = "".join(_MARK.findall("".join(map(_text_of, row["messages"]))))
        for message in row["messages"]:
            if isinstance(message, dict) and _MARK.search(str(message.get("content"))):
                self._check_parts(message)
        self._check_mixture([self._modality(mark) for mark in marks])
        rendered = self._chat.render(row)
        if "".join(_MARK.findall(rendered.text)) != marks:
            raise DataError("the chat template leaves out or repeats a message with a picture")
        return self._with_tokens(rendered, [self._placed(*self.marks.picture(mark)) for mark in marks])

    def _with_tokens(self, rendered: Rendered, pictures: Sequence[Picture | Placed]) -> "_Expanded":
        """A rendered text with the tokens of `pictures`, in the order of their marks, in place of these."""
        shapes = tuple(one.shape for one in pictures)
        for modality in dict.fromkeys([self._processor.takes[0], *(shape.modality for shape in shapes)]):
            if (token := self._processor.stand(modality).token) in rendered.text:
                raise DataError(f"its text has {token!r}, which stands for a {modality.noun} and may not be text")
        asked, answer = self._parted(rendered)
        first, *others = _MARK.split(asked)
        around = [self._around(shape.modality) for shape in shapes]
        pieces = [first]
        for piece, (before, behind) in zip(others, around, strict=True):
            pieces[-1] += before
            pieces.append(behind + piece)
        gaps = self._processor.gaps(pieces, shapes)
        ranges, ends, text = list[tuple[int, int]](), [len(gaps.head)], gaps.head + pieces[0]
        for piece, shown, (_, behind) in zip(pieces[1:], gaps.pictures, around, strict=True):
            ranges.append((len(text), len(text) + len(shown)))
            ends.append(len(text) + len(shown) + len(behind))
            text += shown + piece
        marks = [found.start() for found in _MARK.finditer(asked)]
        written = len(text) + len(gaps.tail)

        def moved(place: int) -> int:
            if answer:
                return written + place - len(asked)
            passed = int(np.searchsorted(marks, place))  # the marks before the place
            return ends[passed] + (place - marks[passed - 1] - 1 if passed else place)

        spans = without(joined((moved(begin), moved(end)) for begin, end in rendered.spans), ranges)
        whole = Rendered(text + gaps.tail + answer, spans, rendered.end_trained, rendered.left_out)
        return _Expanded(whole, ranges, pictures, written if answer else None)

    def _parted(self, rendered: Rendered) -> tuple[str, str]:
        """The text that the processor gets, and an answer behind it, if the processor tells answers from prompts."""
        if not self._processor.reads_prompts or not self._has_answers or not rendered.spans:
            return rendered.text, ""
        (begin, _), *others = rendered.spans
        if others:
            raise DataError(
                f"{len(others) + 1} parts of it would be trained, but this base can learn only one part of a row,"
                " because it reads everything before an answer in both directions. Give the others weight: 0, or make a"
                " row of each"
            )
        if _MARK.search(rendered.text, begin):
            raise DataError(
                "it has a picture in or after the answer, but this base takes pictures only before the answer"
            )
        return rendered.text[:begin], rendered.text[begin:]

    def _with_places(self, given: dict[str, Any]) -> Example:
        """The example with the places of the pictures' tokens, none of which is trained."""
        one, example = given["of"], given["example"]
        places = np.zeros(len(one.pictures), PICTURE)
        targets, written = example.targets.copy(), np.zeros(len(example.tokens), np.bool_)
        if one.ranges or one.answer is not None:
            offsets = np.array(self._chat.offsets(one.rendered.text), np.int64).reshape(-1, 2)
            ahead = len(example.tokens) - len(offsets)  # a token that begins every text
            if one.answer is not None and not (offsets[:, 0] == one.answer).any():
                raise DataError(
                    "a token spans the end of the prompt and the answer's beginning; end the prompt with white space"
                )
            for number, ((begin, end), picture) in enumerate(zip(one.ranges, one.pictures, strict=True)):
                inside = np.flatnonzero((offsets[:, 1] > begin) & (offsets[:, 0] < end)) + ahead
                targets[inside] = False
                written[inside] = True
                places[number] = picture.entry(inside[0], len(inside))
        if (literal := np.flatnonzero(np.isin(example.tokens, self._reserved) & ~written)).size:
            token = self._tokenizer.convert_ids_to_tokens(int(example.tokens[literal[0]]))
            takes = self._processor.takes
            of = next((one for one in takes if getattr(self._processor.made, f"{one.kind}_token") == token), takes[0])
            raise DataError(f"its text has {token!r}, which stands for a {of.noun} and may not be text")
        shapes = tuple(picture.shape for picture in one.pictures)
        together = partial(self._processor.together, shapes) if len(shapes) > 1 else apart
        return Example(example.tokens, targets, example.left_out, places, together)

    def _placed(self, modality: Modality, given: Any) -> Placed:
        """A picture whose bytes are kept, and no longer needed here."""
        self._check_taken(modality)
        picture, writer = self._source.read(modality, given), pictures_of_rows()
        if writer is None:
            return Placed(hashlib.sha256(picture.content).digest(), picture.shape)
        return writer.place(picture.content, picture.shape, picture.stays)

    @cached_property
    def _reserved(self) -> NDArray[np.int64]:
        """The tokens that only pictures may have."""
        around = self._processor.encode("".join(self._around(self._processor.takes[0])))
        return np.array(sorted(self._processor.reserved - set(around)), np.int64)

    def _check_taken(self, modality: Modality) -> None:
        """Raises `DataError` if the base takes no files of the modality, and `ConfigError` if its class cannot be
        trained with them. A run has tried the first one that the base takes."""
        self._processor.stand(modality)
        if modality not in self._checked:
            check_taken(Path(self._tokenizer.name_or_path), self._tokenizer.name_or_path, modality)
            self._checked.add(modality)

    def _check_mixture(self, given: Sequence[Modality]) -> None:
        """Raises `DataError` if the base's class takes no document with files of these modalities together."""
        together = tuple(modality for modality in self._processor.takes if modality in given)
        if len(together) > 1 and together not in self._mixed:
            for modality in together:
                self._check_taken(modality)
            check_mixture(Path(self._tokenizer.name_or_path), self._tokenizer.name_or_path, together)
            self._mixed.add(together)

    def _around(self, modality: Modality) -> tuple[str, str]:
        """The text that the template writes before and behind the processor's token for a file of the modality.

        Raises `ConfigError` if the template writes one elsewhere than in its place."""
        if (known := self._arounds.get(modality.kind)) is not None:
            return known
        token, noun = self._processor.stand(modality).token, modality.noun
        parts = [{"type": "text", "text": _BEFORE}, {"type": modality.kind}, {"type": "text", "text": _BEHIND}]
        text = self._rendered("user", parts) or ""
        found = re.search(f"{_BEFORE}(.*?){re.escape(token)}(.*?){_BEHIND}", text, re.DOTALL)
        if found is None:
            raise ConfigError(
                f"data.template: the chat template does not write a {noun} where it stands in its message, which rows"
                f" with {noun}s need. Give one that writes {token!r} for a part of the type {modality.kind}."
            )
        return self._arounds.setdefault(modality.kind, (found[1], found[2]))

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
        first, *others = _MARK.split(content)
        parts = [{"type": "text", "text": first}] if first else []
        for modality, text in zip(map(self._modality, _MARK.findall(content)), others, strict=True):
            parts.append({"type": modality.kind})
            parts += [{"type": "text", "text": text}] if text else []

        def shown(mark: "re.Match[str]") -> str:
            modality = self._modality(mark[0])
            return self._processor.stand(modality).token.join(self._around(modality))

        own, theirs = self._rendered(role, content), self._rendered(role, parts)
        if None not in (own, theirs) and _MARK.sub(shown, str(own)) != theirs:
            raise DataError(
                "the chat template writes the text beside a picture otherwise if it gets it in parts, as other programs"
                " give it. Remove white space beside the picture"
            )

    def _modality(self, mark: str) -> Modality:
        modality, _ = self.marks.picture(mark)
        return modality


class Marks:
    """The marks of the pictures of some rows. Equal pictures of a row have one mark."""

    def __init__(self) -> None:
        self.given: list[tuple[Modality, Any]] = []
        self._begin = 0

    def next_row(self) -> None:
        self._begin = len(self.given)

    @property
    def of_row(self) -> int:
        """The number of the row's marks so far."""
        return len(self.given) - self._begin

    def of(self, modality: Modality, given: Any) -> str:
        """The mark of a picture of the row, as the row gives it."""
        own, one = range(self._begin, len(self.given)), (modality, given)
        number = next((number for number in own if self.given[number] == one), len(self.given))
        if number == len(self.given):
            if number == _MOST_MARKS:
                raise DataError(f"it and the rows before it have more than {_MOST_MARKS:,} {modality.noun}s")
            self.given.append(one)
        return chr(_FIRST_MARK + number)

    def picture(self, mark: str) -> tuple[Modality, Any]:
        return self.given[ord(mark) - _FIRST_MARK]


def _text_of(message: Any) -> str:
    return str(message.get("content", message.get("value"))) if isinstance(message, dict) else ""


def in_words(turns: Sequence[Turn], marks: Marks) -> list[Turn]:
    def tag(mark: "re.Match[str]") -> str:
        modality, _ = marks.picture(mark[0])
        return modality.tag

    return [turn._replace(content=_MARK.sub(tag, turn.content)) for turn in turns]


class PictureQueue:
    """The files that a row has beside its texts, each with its modality, for the places in the texts that name none."""

    def __init__(self, row: Mapping[str, Any], fields: Mapping[str, str]) -> None:
        self.all, self._names = list[tuple[Modality, Any]](), dict[str, str]()
        for modality in modalities():
            names = names_of(modality.fields[0], modality.fields, fields)
            self._names[modality.kind] = " or ".join(map(repr, names))
            self.all += [(modality, one) for one in files_beside(row, modality, names)]
        self.left = list(self.all)

    def has(self, modality: Modality) -> bool:
        return any(own is modality for own, _ in self.all)

    def take(self, modality: Modality, turn: int) -> Any:
        number = next((number for number, (own, _) in enumerate(self.left) if own is modality), None)
        if number is None:
            has = f"has no more {modality.noun}s" if self.has(modality) else f"has none in {self._names[modality.kind]}"
            raise DataError(f"turn {turn} has a place for a {modality.noun}, and the row {has}")
        return self.left.pop(number)[1]

    def check_used(self) -> None:
        if self.left:
            modality, _ = self.left[0]
            count, left = (sum(own is modality for own, _ in given) for given in (self.all, self.left))
            raise DataError(f"it has {counted(count, modality.noun)}, and its text has places for {count - left}")


def _trained() -> str:
    """Say what rows may have: "pictures and text"."""
    return f"{', '.join(f'{modality.noun}s' for modality in modalities())} and text"


def talk_of(row: dict[str, Any], fields: Mapping[str, str], marks: Marks) -> list[Message]:
    """The messages of a row with marks for its pictures. Raises `DataError`."""
    name = next((name for name in names_of("messages", MESSAGES, fields) if row.get(name) is not None), "messages")
    if not isinstance(row.get(name), list):
        raise DataError(f"no field {name!r} with a conversation (the row has: {', '.join(row)})")
    marks.next_row()
    queue = PictureQueue(row, fields)
    messages = marked(row[name], queue, marks)
    if not marks.of_row:
        before_first_question(messages, queue, marks)
    queue.check_used()
    return messages


def before_first_question(messages: list[Message], queue: PictureQueue, marks: Marks) -> None:
    """Put all pictures before the first message of a user, because no text says where they are."""
    asked = (one for one in messages if isinstance(one, dict))  # reading the messages says what others are
    first = next((one for one in asked if one.get("role", one.get("from")) in ("user", "human")), None)
    if first is not None and queue.left:
        key = "value" if "value" in first and "content" not in first else "content"
        first[key] = "".join(marks.of(*one) for one in queue.left) + str(first.get(key) or "")
        queue.left = []


def marked(talk: Sequence[Any], queue: PictureQueue, marks: Marks) -> list[Message]:
    """Messages with a mark for each of their pictures, which are in their parts or in the `queue`."""
    return [_marked(message, turn, queue, marks) for turn, message in enumerate(talk, 1)]


def _marked(message: Any, turn: int, queue: PictureQueue, marks: Marks) -> Any:
    if not isinstance(message, dict):
        return message
    key = "value" if "value" in message and "content" not in message else "content"
    content = message.get(key)
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []
    if not all(isinstance(part, dict) for part in parts):
        return message
    asks = isinstance(content, str) and message.get("role", message.get("from")) not in ("assistant", "gpt")
    texts = list[str]()
    for part in parts:
        kind, text = part.get("type"), part.get("text")
        if (modality := next((one for one in modalities() if kind in one.parts), None)) is not None:
            if text:
                raise DataError(f"turn {turn} has a {modality.noun} and a text in one part. Give each its own part")
            own = part if any(part.get(name) for name in modality.held) else queue.take(modality, turn)
            texts.append(marks.of(modality, own))
        elif kind == "text" and isinstance(text, str):
            if found := _MARK.search(text):
                raise DataError(f"turn {turn} has a character of a private use plane of Unicode, U+{ord(found[0]):X}")
            texts.append(_with_marks(text, turn, queue, marks, asks=asks))
        elif isinstance(kind, str) and kind != "text":
            raise DataError(f"turn {turn} has a part of type {kind!r}; only parts of {_trained()} are trained on")
        else:
            return message  # whose error reading the messages gives
    return {**message, key: "".join(texts)} if parts else message


def _with_marks(text: str, turn: int, queue: PictureQueue, marks: Marks, *, asks: bool) -> str:
    """A text with marks in place of its tags. The tag of a modality of which the row has no file beside its texts is
    text, unless the text `asks`: then the file was forgotten."""
    tagged = {modality.tag: modality for modality in modalities() if asks or queue.has(modality)}
    if not tagged:
        return text

    def mark(tag: "re.Match[str]") -> str:
        modality = tagged[tag[1]]
        return marks.of(modality, queue.take(modality, turn))

    return re.sub(f"({'|'.join(map(re.escape, tagged))})\n?", mark, text)


@dataclass(frozen=True)
class _Expanded:
    """A rendered row: its text with the tokens of its pictures, which stand at `ranges`. `answer` is where its answer
    begins, if the base's processor tells answers from prompts."""

    rendered: Rendered
    ranges: list[tuple[int, int]]
    pictures: Sequence[Any]
    answer: int | None = None
