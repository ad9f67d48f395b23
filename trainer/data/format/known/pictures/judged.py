"""Renders rows of answers or classes whose conversations have pictures: preference pairs, labelled answers, classes.

The pictures of a row become marks first (trainer/data/format/known/pictures/render.py), so the renderers of such rows
without pictures take the row apart. Its prompt comes first: the pictures beside the texts are those of the prompt, and
then those of each answer.
"""

from collections.abc import Callable, Sequence
from typing import Any

from trainer.base.find.media import Modality
from trainer.data.format.formats import or_error
from trainer.data.format.known.pictures.render import (
    Marks,
    PictureQueue,
    PictureRenderer,
    before_first_question,
    in_words,
    marked,
    talk_of,
)
from trainer.data.format.messages import Message
from trainer.data.format.pictures import names_of
from trainer.data.format.row_format import MESSAGES
from trainer.data.render.answers import AnswersRenderer
from trainer.data.render.chat import Example, tools_of
from trainer.data.render.document import Document, Turn
from trainer.errors import DataError

Row = dict[str, Any]
Reader = Callable[[Row, Any, Marks], Row]


class MarkedRenderer:
    """Encodes rows of one kind. `read` puts marks into a row, and `made` gives the renderer of such rows without
    pictures, which gets the settings, and what encodes its conversations. `has_answers` is as in `PictureRenderer`."""

    def __init__(
        self, tokenizer: Any, data: Any, read: Reader, made: Callable[..., Any], *, has_answers: bool = True
    ) -> None:
        self._data, self._read = data, read
        self._pictures: PictureRenderer | None = None

        def rendered(settings: Any) -> "_Conversations":
            self._pictures = PictureRenderer(tokenizer, settings, has_answers=has_answers)
            return _Conversations(self._pictures)

        self._rows = made(tokenizer, data.model_copy(update={"fields": {}}), rendered)

    def encode(self, rows: Sequence[Row]) -> list[Document | DataError]:
        marks = self._begin()
        read = [or_error(lambda row: self._read(row, self._data, marks), row) for row in rows]
        encoded = iter(self._rows.encode([row for row in read if not isinstance(row, DataError)]))
        return [row if isinstance(row, DataError) else next(encoded) for row in read]

    def turns(self, row: Row) -> list[Turn]:
        marks = self._begin()
        return in_words(self._rows.turns(self._read(row, self._data, marks)), marks)

    def question(self, row: Row) -> Any:
        """See `PictureRenderer.question`."""
        assert self._pictures is not None
        return self._pictures.question(row)

    def judged(self, row: Row) -> Any:
        """See `PictureRenderer.judged`."""
        assert self._pictures is not None
        return self._pictures.judged(row)

    def served(self, row: Row) -> Any:
        """See `PictureRenderer.served`."""
        assert self._pictures is not None
        return self._pictures.served(row)

    @property
    def reads_prompts(self) -> bool:
        """See `PictureRenderer.reads_prompts`."""
        assert self._pictures is not None
        return self._pictures.reads_prompts

    def contents(self, row: Row) -> list[bytes]:
        """The bytes of the pictures of a row. Raises `DataError` if one is none."""
        marks = self._begin()
        self._read(row, self._data, marks)
        assert self._pictures is not None
        return self._pictures.bytes_of(marks)

    def _begin(self) -> Marks:
        assert self._pictures is not None
        self._pictures.marks = marks = Marks()
        return marks


def of_answers(
    tokenizer: Any, data: Any, read: Reader, read_texts: Callable[..., Any], documents_of: Callable[..., Any]
) -> MarkedRenderer:
    """Return the renderer of rows of answers. `AnswersRenderer` takes `read_texts` and `documents_of`."""

    def made(tokenizer: Any, data: Any, rendered: Any) -> AnswersRenderer[Any]:
        return AnswersRenderer(tokenizer, data, read_texts, documents_of, rendered)

    return MarkedRenderer(tokenizer, data, read, made)


class _Conversations:
    """The encoder of conversations for the renderers of answers and classes."""

    def __init__(self, pictures: PictureRenderer) -> None:
        self._pictures = pictures

    def encode(self, rows: Sequence[Row]) -> list[Example | DataError]:
        return self._pictures.encode_marked(rows)

    def turns(self, row: Row) -> list[Turn]:
        return self._pictures.turns_of_marked(row)


def read_pair(row: Row, data: Any, marks: Marks) -> Row:
    """A row with the fields of trainer.data.render.answers.read_pair, in which marks stand for pictures."""
    return _answers(row, data, marks, ("chosen", "rejected"))


def read_labelled(row: Row, data: Any, marks: Marks) -> Row:
    fields = data.fields
    label = next((name for name in names_of("label", ("label", "kto_tag"), fields) if name in row), "label")
    if label not in row:
        raise DataError(f"no field {label!r} (the row has: {', '.join(row)})")
    name, talk = _prompt(row, fields)
    if "completion" not in fields and "completion" not in row and isinstance(talk, list):
        row = {**row, name: talk[:-1], "completion": talk[-1:]}
    return {**_answers(row, data, marks, ("completion",)), "label": row[label]}


def read_classified(row: Row, data: Any, marks: Marks) -> Row:
    label = next((name for name in names_of("label", ("label", "labels"), data.fields) if name in row), "label")
    if label not in row:
        raise DataError(f"no field {label!r} (the row has: {', '.join(row)})")
    return {"messages": talk_of(row, data.fields, marks), "tools": tools_of(row, data), "label": row[label]}


def _prompt(row: Row, fields: Any) -> tuple[str, Any]:
    """The name of the prompt of a row, and the prompt; None if the answers are whole conversations."""
    names = names_of("prompt", ("prompt", *MESSAGES), fields)
    name = next((name for name in names if row.get(name) is not None), names[0])
    return name, row.get(name)


def _answers(row: Row, data: Any, marks: Marks, names: Sequence[str]) -> Row:
    marks.next_row()
    queue = PictureQueue(row, data.fields)
    _, given = _prompt(row, data.fields)
    prompt = None if given is None else marked(_talk(given, "prompt", "user"), queue, marks)
    rest, made, left = list(queue.left), dict[str, list[Message]](), list[list[tuple[Modality, Any]]]()
    for name in names:
        called = data.fields.get(name, name)
        if called not in row:
            raise DataError(f"no field {called!r} (the row has: {', '.join(row)})")
        queue.left = list(rest)
        made[name] = marked(_talk(row[called], name, "assistant"), queue, marks)
        left.append(queue.left)
    if not marks.of_row:  # no text says where they are
        for talk in made.values() if prompt is None else (prompt,):
            queue.left = list(queue.all)
            before_first_question(talk, queue, marks)
    else:
        queue.left = (max if prompt is None else min)(left, key=len)
    queue.check_used()
    return {**({} if prompt is None else {"prompt": prompt}), **made, "tools": tools_of(row, data)}


def _talk(given: Any, name: str, role: str) -> list[Any]:
    """A field as messages: a text is one message. Raises `DataError` for anything else."""
    if isinstance(given, str):
        return [{"role": role, "content": given}]
    found = [given] if isinstance(given, dict) else given
    if not isinstance(found, list) or not found:
        raise DataError(f"{name}: this is no text and no list of messages")
    return found
