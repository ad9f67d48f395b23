"""Rows of a text, or of a conversation, and its class, and rows of words, each of which has a tag."""

from collections.abc import Callable
from typing import Any

from trainer.data.format.row_format import MESSAGES, Row, RowFormat, Values, is_talk, is_text, talk, tools, with_system
from trainer.errors import DataError


def _is_class(value: Any) -> bool:
    return isinstance(value, str | int) and value != ""


def _are_classes(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_class, value))


def label_name(value: Any) -> str:
    """The name of a class as data.labels has it. Raises `DataError` for a value that names none."""
    if isinstance(value, bool):
        return str(value).lower()
    if _is_class(value):
        return str(value)
    raise DataError(f"the label is {value!r}, and not the name or the number of a class")


def _read_messages(values: Values) -> Row:
    return {"messages": with_system(values, talk(values)), "tools": tools(values), "label": values["label"]}


def _of_texts(kind: str, fits: Callable[[Any], bool], place: int) -> RowFormat:
    return RowFormat(
        ("text", "label"),
        kind,
        lambda values: is_text(values.get("text")) and fits(values.get("label")),
        names={"text": ("text", "sentence"), "label": ("label", "labels")},
        place=place,
    )


def _of_messages(kind: str, fits: Callable[[Any], bool], place: int) -> RowFormat:
    return RowFormat(
        ("messages", "label", "system", "tools"),
        kind,
        lambda values: is_talk(values.get("messages")) and fits(values.get("label")),
        _read_messages,
        {"messages": MESSAGES, "label": ("label", "labels")},
        place=place,
    )


def _are_tagged_words(values: Values) -> bool:
    words, tags = values.get("words"), values.get("tags")
    if not (isinstance(words, list) and isinstance(tags, list) and words and len(words) == len(tags)):
        return False
    return is_text(*words) and all(isinstance(tag, str | int) for tag in tags)


ROW_FORMATS = {
    "classified": _of_texts("classified", _is_class, 140),
    "classified_messages": _of_messages("classified", _is_class, 150),
    "multilabel": _of_texts("multilabel", _are_classes, 152),
    "multilabel_messages": _of_messages("multilabel", _are_classes, 154),
    "tagged": RowFormat(
        ("words", "tags"),
        "tagged",
        _are_tagged_words,
        names={"words": ("words", "tokens"), "tags": ("tags", "ner_tags", "pos_tags", "labels")},
        place=160,
    ),
}
