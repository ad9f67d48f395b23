"""Rows with a text or a conversation and its class, and rows with words that each have a tag."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from unicodedata import normalize

from trainer.data.format.messages import text_of
from trainer.data.format.row_format import (
    MESSAGES,
    TEMPLATED,
    Row,
    RowFormat,
    RowKind,
    Values,
    is_talk,
    is_text,
    talk,
    tools,
    with_system,
)
from trainer.errors import DataError


def _is_class(value: Any) -> bool:
    return isinstance(value, str | int) and value != ""


def _are_classes(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_class, value))


def label_name(value: Any) -> str:
    """The name of a class, in the form of data.labels. Raises `DataError` if the value cannot be a name.

    The name is in Unicode's form NFC, so that a composed and a decomposed letter are the same.
    """
    if isinstance(value, bool):
        return str(value).lower()
    if _is_class(value):
        return normalize("NFC", text_of(str(value), "label"))
    raise DataError(f"the label is {value!r}, and not the name or the number of a class")


_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")
_TRUTH = {"false": 0.0, "true": 1.0}


def _amount(name: str) -> float | None:
    """The number that a name stands for; a truth value counts as 0 or 1. None for any other name."""
    written = name.strip().lower()
    return float(written) if _NUMBER.fullmatch(written) else _TRUTH.get(written)


def alike(names: Iterable[str]) -> tuple[str, str] | None:
    """Two names that look like the same class, if there are any: equal numbers, or names that differ in white space."""
    seen = dict[Any, str]()
    for name in sorted(names):
        amount = _amount(name)
        if (other := seen.setdefault(" ".join(name.split()) if amount is None else amount, name)) != name:
            return other, name
    return None


class Classes:
    """The numbers of the classes that `data.labels` names.

    If any name is a number, a whole number in a row is a name. Otherwise it counts the names from 0. So a number never
    means a name in one row and a count in the next.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._numbers = {normalize("NFC", name): number for number, name in enumerate(names)}
        self._counted = all(_amount(name) is None for name in names)

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, value: Any) -> int:
        """The number of a row's class. Raises `DataError` if the value is none of the classes."""
        name = label_name(value)
        if name in self._numbers:
            return self._numbers[name]
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if self._counted and is_whole and 0 <= value < len(self):
            return value
        unknown = f"the label is {name!r}, which is none of data.labels ({', '.join(self._numbers)})"
        if is_whole and not self._counted:
            unknown += "; these are numbers themselves, so a number in a row is a name and never counts them from 0"
        raise DataError(unknown)


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


def _of_texts_renderer(tokenizer: Any, data: Any) -> Any:
    from trainer.data.render.numbered import ClassifiedRenderer

    return ClassifiedRenderer(tokenizer, data)


def _of_words_renderer(tokenizer: Any, data: Any) -> Any:
    from trainer.data.render.numbered import TaggedRenderer

    return TaggedRenderer(tokenizer, data)


def _kind(renderer: Callable[[Any, Any], Any], parted: str, objective: str, segments: int = 1) -> RowKind:
    return RowKind(
        renderer,
        reads=(*TEMPLATED, "labels"),
        trained="label",
        fixed="have a class, which is trained",
        parted=parted,
        segments=segments,
        objective=objective,
    )


ROW_KINDS = {
    "classified": _kind(_of_texts_renderer, "a text from its class", "classification"),
    "multilabel": _kind(_of_texts_renderer, "a text from its classes", "multilabel_classification"),
    "tagged": _kind(_of_words_renderer, "words from their tags", "token_classification", segments=2),
}
