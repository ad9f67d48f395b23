"""One source of the data: where its documents are, how often they are visited, and how its rows are read.

`replace` replaces texts in a row. `write` makes fields of a row's other fields, by templates such as `{question}
{answers.text.0}`. `{name}` stands for a field, `{name.part.0}` for what is inside it, and `{name[other]}` for the item
of a list whose number is in the field `other`. `{{` and `}}` are braces.
"""

import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

from pydantic import model_validator

from trainer.config.row_kinds import Format, check_fields
from trainer.config.section import Section, setting
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


class Source(Section):
    """One source of documents."""

    path: str = setting(
        about=(
            "Where the rows are, locally or at s3://, gs://, az://: a file or a glob of .jsonl, .json, .csv, .tsv,"
            " .txt (one text a line) or .tar (WebDataset), each also with .gz or .zst, or of .parquet, .arrow or"
            " .mds; or the folder of a saved Hugging Face data set or of MDS shards. Or a data set of the Hugging"
            " Face Hub: hf://owner/name, optionally followed by @revision or by a file."
        ),
        example="data/train-*.jsonl",
    )
    weight: float = setting(
        1.0,
        about=(
            "How often an epoch visits each document. 2: twice. 0.5: an epoch visits one half of the documents, and"
            " the next epoch the other half."
        ),
        example=0.5,
        gt=0,
        le=1000,
        unit="visits an epoch",
    )
    fraction: float | None = setting(
        None,
        about=(
            "Instead of weight: this source's share of the tokens of an epoch. Use it for instance to replay general"
            " data, so that the model forgets less."
        ),
        example=0.1,
        gt=0,
        lt=1,
        unit="share of tokens",
    )
    format: Format | None = setting(
        None, about="The format of this source's rows, if it differs from data.format.", example="alpaca"
    )
    fields: dict[str, str] = setting(
        {},
        about=(
            "Names of the fields in this source's rows, as in data.fields. data.fields applies too, unless the source"
            " has a format of its own."
        ),
        example={"messages": "dialogue"},
    )
    replace: dict[str, str] = setting(
        {},
        about=(
            "Replacements in all texts of this source's rows, such as for placeholders of a name. They are made"
            " before the rows are interpreted. A key that begins with re: is a regular expression, and \\1 in its"
            " replacement is its first group."
        ),
        example={"{{NAME}}": "Capstan"},
    )
    write: dict[str, str | list[str]] = setting(
        {},
        about=(
            "Templates for the format's fields, filled from the row's own fields. {name} is a field of the row,"
            " {name.part.0} a value inside it, and {name[other]} the item of the list `name` whose number is in the"
            " field `other`. Of several templates for a field, Capstan takes the first for which the row has a"
            " text in every field that the template names. You must also set the source's format."
        ),
        example={"prompt": "Question: {question} Answer: ", "completion": "{answers.text.0}"},
    )
    without: dict[str, str | list[str]] = setting(
        {},
        about=(
            "Rows to leave out: those in which the field has the given text, or one of the given texts. take and skip"
            " count these rows too."
        ),
        example={"source": "toxic-dpo-v0.2"},
    )
    subset: str | None = setting(
        None,
        about=(
            "Name of a configuration (subset) of a data set of the Hub. Default: the data set's default configuration."
        ),
        example="en",
    )
    split: str | None = setting(None, about="Split of a data set of the Hub. Default: train.", example="test")
    take: int | float | None = setting(
        None,
        about="How many of the first rows to take, as a number of rows or, below 1, as a share. Default: all rows.",
        example=1000,
        gt=0,
        unit="rows, or share of rows",
    )
    skip: int = setting(
        0,
        about="How many rows to leave out before the rows that are taken. With take_seed, in the random order.",
        example=1000,
        ge=0,
        unit="rows",
    )
    take_seed: int | None = setting(
        None,
        about="Seed of a random order of the rows. take and skip then use this order instead of the file's.",
        example=42,
        ge=0,
        lt=2**32,
    )

    @property
    def templates(self) -> dict[str, tuple[str, ...]]:
        """The templates of `write` by their fields."""
        return {name: (given,) if isinstance(given, str) else tuple(given) for name, given in self.write.items()}

    @property
    def left_out(self) -> dict[str, tuple[str, ...]]:
        """The texts of `without` by their fields."""
        return {name: (given,) if isinstance(given, str) else tuple(given) for name, given in self.without.items()}

    @model_validator(mode="after")
    def _consistent(self) -> "Source":
        if self.take is not None and self.take > 1 and self.take % 1:
            raise ValueError(
                f"take: {self.take:g} is not allowed. Give a whole number of rows, or a share of them below 1. Example:"
                " 0.01."
            )
        if isinstance(self.take, float) and self.take == 1:
            raise ValueError("take: 1.0 is not allowed. Leave it out for all rows, or give 1 for a single one.")
        if self.take_seed is not None and self.take is None and not self.skip:
            raise ValueError("take_seed: has no effect without take. Set that, or remove it.")
        for name in ("subset", "split"):
            if getattr(self, name) is not None and not self.path.startswith("hf://"):
                raise ValueError(f"{name}: has no effect on {self.path!r}, which is not of the Hub (hf://). Remove it.")
        if "" in self.replace:
            raise ValueError("replace: an empty text cannot be replaced. Name the text, such as '{{NAME}}'.")
        for text, other in self.replace.items():
            if wrong := check_replaced(text, other):
                raise ValueError(f"replace: {text!r}: {wrong}.")
        for name, given in self.write.items():
            if not self.format:
                raise ValueError("write: needs a format, of which its fields are. Set the source's format.")
            check_fields("write", self.format, self.write)
            for template in self.templates[name]:
                if wrong := check_template(template):
                    raise ValueError(f"write.{name}: {template!r}: {wrong}.")
            if not given:
                raise ValueError(f"write.{name}: has no template. Give one, or remove it.")
        if self.format:
            check_fields("fields", self.format, self.fields)
        if self.fraction is not None and self.weight != 1.0:
            raise ValueError("weight and fraction: both given. Set one of them.")
        return self
