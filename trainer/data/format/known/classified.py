"""Rows of a text, or of a conversation, and its class."""

from typing import Any

from trainer.data.format.row_format import Row, RowFormat, Values, is_talk, is_text, talk, tools, with_system
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


ROW_FORMATS = {
    "classified": RowFormat(
        ("text", "label"),
        "classified",
        lambda values: is_text(values.get("text")) and _is_class(values.get("label")),
        names={"text": ("text", "sentence"), "label": ("label", "labels")},
        place=140,
    ),
    "classified_messages": RowFormat(
        ("messages", "label", "system", "tools"),
        "classified",
        lambda values: is_talk(values.get("messages")) and _is_class(values.get("label")),
        _read_messages,
        ("messages", "label"),
        {"messages": ("messages", "conversations", "conversation"), "label": ("label", "labels")},
        place=150,
    ),
    "multilabel": RowFormat(
        ("text", "label"),
        "multilabel",
        lambda values: is_text(values.get("text")) and _are_classes(values.get("label")),
        names={"text": ("text", "sentence"), "label": ("label", "labels")},
        place=152,
    ),
    "multilabel_messages": RowFormat(
        ("messages", "label", "system", "tools"),
        "multilabel",
        lambda values: is_talk(values.get("messages")) and _are_classes(values.get("label")),
        _read_messages,
        ("messages", "label"),
        {"messages": ("messages", "conversations", "conversation"), "label": ("label", "labels")},
        place=154,
    ),
}
