"""Texts that `data.train[].replace` replaces in a row, and fields that `data.train[].write` makes of its other fields,
by templates such as `{question} {answers.text.0}`.

`{name}` stands for a field, `{name.part.0}` for what is inside it, and `{name[other]}` for the item of a list whose
number is in the field `other`. `{{` and `}}` are braces.
"""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from trainer.errors import DataError, shown

Row = dict[str, Any]
Templates = tuple[tuple[str, tuple[str, ...]], ...]
"""(field, its templates) for each field that is written."""

_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_PATH = re.compile(r"(?P<field>[^.\[\]{}]+)(?P<inside>(?:\.[^.\[\]{}]+)*)(?:\[(?P<index>[^.\[\]{}]+)\])?")

_EXPRESSION = "re:"
_NUMBER = re.compile(r"[0-9]{1,18}")  # a row may have any text there; Python reads no number of thousands of digits


def check_template(template: str) -> str | None:
    """Return what is wrong with a template, as a clause, or None."""
    for found in _PLACE.finditer(template):
        if found[1] is not None and _PATH.fullmatch(found[1]) is None:
            return (
                f"{found[0]} names no field; write {{name}}, {{name.part.0}} or {{name[other]}}, and {{{{ for a brace"
            )
    if set(_PLACE.sub("", template)) & {"{", "}"}:
        return "a brace is alone; write {{ or }} for one that is text"
    return None


def check_replaced(text: str, other: str) -> str | None:
    """Return what is wrong with a text to replace, as a clause, or None. Behind `re:` it is a regular expression."""
    if not text.startswith(_EXPRESSION):
        return None
    try:
        re.sub(f"{text.removeprefix(_EXPRESSION)}|", other, "")  # the replacement is read where something matches
    except re.error as error:
        return f"is no regular expression with this replacement ({error})"
    return None


def with_replaced(value: str, text: str, other: str) -> str:
    """The text `value`, in which `text` is replaced by `other` wherever it stands."""
    if text.startswith(_EXPRESSION):
        return re.sub(text.removeprefix(_EXPRESSION), other, value)
    return value.replace(text, other)


def fields_of(written: Templates) -> set[str]:
    """The fields of a row that the templates read."""
    paths = (found[1] for _, templates in written for one in templates for found in _PLACE.finditer(one) if found[1])
    parsed = [path for given in paths if (path := _PATH.fullmatch(given))]
    return {str(path["field"]) for path in parsed} | {str(path["index"]) for path in parsed if path["index"]}


def with_written(row: Row, written: Templates) -> Row:
    """The row with its written fields. Raises `DataError` if it lacks a field that a template names."""
    return {**row, **{field: _text(row, templates) for field, templates in written}}


def _text(row: Row, templates: Sequence[str]) -> str:
    """The text of the first template whose fields all have one; the last is for rows in which none does."""
    *others, last = templates
    for template in others:
        with suppress(DataError):  # the row lacks a field that a later template may do without
            values = _values(row, template)
            if all(values):
                return _filled(template, values)
    return _filled(last, _values(row, last))


def _values(row: Row, template: str) -> list[str]:
    return [_value(row, found[1]) for found in _PLACE.finditer(template) if found[1] is not None]


def _filled(template: str, values: Iterable[str]) -> str:
    filled = iter(values)
    return _PLACE.sub(lambda found: found[0][0] if found[1] is None else next(filled), template)


def _value(row: Row, path: str) -> str:
    found = _PATH.fullmatch(path)
    assert found is not None, path
    value: Any = row
    steps = [found["field"], *filter(None, found["inside"].split("."))]
    if found["index"]:
        steps.append(_value(row, found["index"]))
    for step in steps:
        if isinstance(value, list) and _NUMBER.fullmatch(step) and int(step) < len(value):
            value = value[int(step)]
        elif isinstance(value, dict) and step in value:
            value = value[step]
        else:
            raise DataError(f"no {shown(step)} for {{{path}}} of write (the row has: {', '.join(row) or 'none'})")
    if value is None:
        return ""
    if isinstance(value, list | dict):
        raise DataError(f"{{{path}}} of write is a {type(value).__name__}, and not a text")
    return str(value)
