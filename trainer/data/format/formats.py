"""Finds out how the rows of a source are read: the format that most of them have, and the names of their fields.

The formats are in trainer/data/format/known."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from trainer.config import Data
from trainer.config.row_kinds import ROW_FORMATS, ROW_KINDS
from trainer.config.source import Templates, fields_of, with_replaced, with_written
from trainer.data.format.pictures import refuse_pictures
from trainer.data.format.row_format import Row, RowFormat
from trainer.data.format.unrendered import strings_of
from trainer.errors import DataError

Result = TypeVar("Result")

FORMATS = cast(Mapping[str, RowFormat], ROW_FORMATS)
"""Every format of rows, as a whole; the settings know some facts of each."""

# Common names of fields that no format looks for by itself. Capstan proposes them to the user.
_OFTEN_CALLED = {
    "messages": ("conversations", "conversation", "dialogue", "dialog", "chat", "turns"),
    "prompt": ("question", "instruction", "query", "input"),
    "completion": ("answer", "response", "output", "target", "reply"),
    "text": ("content", "body", "document", "raw_content"),
    "chosen": ("preferred", "accepted", "response_chosen", "winner"),
    "rejected": ("dispreferred", "response_rejected", "loser"),
    "output": ("answer", "completion", "target"),
    "label": ("desired", "is_good", "thumbs_up"),
}

# Fields that an answer may depend on, in a row of any format.
_KNOWN = ("system", "instruction", "context", "input", "history", "tools")


@dataclass(frozen=True)
class RowForm:
    """How the rows of a source are read: their format, and (field, name) for each field with another name.

    `replaced` has (text, other text) for each text that is replaced in all texts of a row before it is read.
    `without` has (field, texts) for each field by which rows are left out: those in which it is one of these texts.
    `written` has the fields that are then written from the others.
    `unread` lists the other fields that the rows had when the form was detected.
    """

    format: str
    fields: tuple[tuple[str, str], ...] = ()
    replaced: tuple[tuple[str, str], ...] = ()
    written: Templates = ()
    without: tuple[tuple[str, tuple[str, ...]], ...] = ()
    unread: tuple[str, ...] = field(default=(), compare=False)

    @property
    def kind(self) -> str:
        return FORMATS[self.format].kind

    @property
    def names(self) -> dict[str, str]:
        """The name in the row of each field of the format."""
        return {name: FORMATS[self.format].called(name)[0] for name in FORMATS[self.format].fields} | dict(self.fields)

    def leaves_out(self, row: Row) -> bool:
        """Whether the row is none of the source's, by `without`."""
        return any(row.get(name) in texts for name, texts in self.without)

    def read(self, row: Row) -> Row:
        """Convert the row to its kind; `renderer_fields` renames the fields.

        Raises `DataError` for another format, and for a row with pictures."""
        found = FORMATS[self.format]
        if not ROW_KINDS[self.kind].sees:
            refuse_pictures(row, self.names.values())
        if self.replaced:
            row = {name: _with_replaced(value, self.replaced) for name, value in row.items()}
        if self.written:
            row = with_written(row, self.written)
        if found.read is None:
            return row
        names = self.names
        for needed in found.needs:
            if names[needed] not in row:
                raise missing_field(row, needed, names[needed], self.kind)
        return found.read({name: row[given] for name, given in names.items() if given in row})

    @property
    def renderer_fields(self) -> dict[str, str]:
        return {} if FORMATS[self.format].read else dict(self.fields)

    def unused(self, row: Row) -> list[str]:
        """The fields of a row that its format does not read."""
        used = set(self.names.values()) | fields_of(self.written)
        found = FORMATS[self.format]
        for asked, named in self.names.items():
            if found.read is None and not row.get(named) and asked not in dict(self.fields):
                used |= set([name for name in found.called(asked) if row.get(name)][:1])  # as its renderer looks for it
        return [name for name in row if name not in used]

    def __str__(self) -> str:
        named = ", ".join(dict.fromkeys(self.names.values()))
        return f"{self.format} ({named})"

    @property
    def overrides(self) -> str:
        """The settings that ask for this form, as on the command line."""
        return " ".join([f"data.format={self.format}", *(f"data.fields.{name}={given}" for name, given in self.fields)])


def _with_replaced(value: Any, replaced: Iterable[tuple[str, str]]) -> Any:
    """A value of a row, with the texts in it replaced, however deep they are."""
    if isinstance(value, str):
        for text, other in replaced:
            value = with_replaced(value, text, other)
        return value
    if isinstance(value, list):
        return [_with_replaced(item, replaced) for item in cast(list[Any], value)]
    if isinstance(value, dict):
        return {name: _with_replaced(item, replaced) for name, item in cast(dict[str, Any], value).items()}
    return value


def explicit_form(data: Data) -> RowForm:
    """The form of all sources of a run that names its format."""
    assert data.format != "auto"
    return RowForm(data.format, tuple(sorted(data.fields.items())))


def form_of(row: Row, format: str, given: Mapping[str, str]) -> RowForm | None:
    """The form of a row of `format`. `given` names some of its fields. None if the row does not have that format."""
    found, names = FORMATS[format], dict[str, str]()
    for name in FORMATS[format].fields:
        called = (given[name],) if name in given else found.called(name)
        names[name] = next((call for call in called if call in row), called[0])
    if not found.fits({name: row[call] for name, call in names.items() if call in row}):
        return None
    others = ((name, call) for name, call in names.items() if name in given or call != found.called(name)[0])
    return RowForm(format, tuple(sorted(others)))


def detect(rows: Sequence[Row], given: Mapping[str, str], kinds: Collection[str]) -> RowForm | None:
    """The form that most of the rows have, if possible one of these `kinds`. None if they have no known format."""
    known = [format for format in FORMATS if given.keys() <= set(FORMATS[format].fields)]
    for formats in (
        [f for f in known if FORMATS[f].kind in kinds],
        [f for f in known if FORMATS[f].kind not in kinds],
    ):
        fitting = {format: [row for row in rows if form_of(row, format, given)] for format in formats}
        best = max(formats, key=lambda format: len(fitting[format]), default=None)
        if best is not None and fitting[best]:
            return _common_form(best, fitting[best], given)
    return None


def _common_form(format: str, rows: Sequence[Row], given: Mapping[str, str]) -> RowForm:
    """The form of rows of one format. Each field gets the name under which most rows have a non-empty value."""

    def holders(call: str) -> tuple[int, int]:
        """The number of rows with a non-empty value under this name, and of all rows that have it."""
        values = [row[call] for row in rows if call in row]
        return sum(value not in (None, "", [], {}) for value in values), len(values)

    fields = dict(given)
    for name in FORMATS[format].fields:
        called = FORMATS[format].called(name)
        most = max(called, key=holders)
        if name not in given and most != called[0]:
            fields[name] = most
    return RowForm(format, tuple(sorted(fields.items())))


def lost_fields(form: RowForm, rows: Iterable[Row]) -> list[str]:
    """The fields of known meaning that the form does not read, although a row has a value there and nowhere else."""
    own = [row for row in rows if form_of(row, form.format, dict(form.fields))]
    return [
        name for name in _KNOWN if name not in form.names.values() and any(_is_lost(form, row, name) for row in own)
    ]


def _is_lost(form: RowForm, row: Row, name: str) -> bool:
    value = row.get(name)
    if not isinstance(value, str):
        return isinstance(value, list | dict) and bool(value)
    read = (text for given in form.names.values() for text in strings_of(row.get(given)))
    said = value.strip()
    return bool(said) and not any(f"\n{said}\n" in f"\n{text.strip()}\n" for text in read)


def wider_form(form: RowForm, rows: Iterable[Row], lost: Collection[str]) -> RowForm | None:
    """A form that reads the same of these rows as `form`, and also the `lost` fields. None if there is none."""
    if (wider := FORMATS[form.format].wider) is None:
        return None
    format, renamed = wider
    names = {renamed.get(name, name): call for name, call in form.names.items()}
    names |= {name: call for call in lost for name in FORMATS[format].fields if call in FORMATS[format].called(name)}
    given = {name: call for name, call in names.items() if call != FORMATS[format].called(name)[0]}
    found = next(filter(None, (form_of(row, format, given) for row in rows)), None)
    return found if found and set(lost) <= set(found.names.values()) else None


def or_error(read: Callable[[Row], Result], row: Row) -> Result | DataError:
    """The result of `read` for the row, or what is wrong with the row."""
    try:
        return read(row)
    except DataError as error:
        return error
    except RecursionError:
        return DataError("its values are nested too deeply")


def missing_field(row: Row, name: str, called: str, kind: str) -> DataError:
    """The error for a row that lacks the field `name`, expected under the name `called`.

    It proposes a setting that reads the row.
    """
    return DataError(f"no field {called!r} (the row has: {', '.join(row) or 'none'}); {_proposal(row, name, kind)}")


def _proposal(row: Row, name: str, kind: str) -> str:
    often = next((call for call in _OFTEN_CALLED.get(name, ()) if call in row), None)
    form = detect([row], {}, [kind])
    if form is not None:
        return f"{form.overrides} reads such rows"
    if often is not None:
        return f"data.fields.{name}={often} reads such rows"
    return "data.fields renames fields"


def as_read(data: Data, form: RowForm) -> Data:
    """The settings for rows that were converted: those of the form's kind."""
    return data.model_copy(update={"format": form.kind, "fields": form.renderer_fields})
