"""The formats that rows come in: how each is recognised, and how its rows become those of the few that are tokenized.

A format is one entry of `FORMATS`. Rows of `chat`, `prompt_completion`, `text`, `preference` and `labelled` are tokenized as
they are; the rows of every other format are read into one of these. Alpaca's and ShareGPT's follow LLaMA-Factory's converters
(llamafactory/data/converter.py), prompts and completions of messages follow TRL's conversational data sets.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trainer.config import Data
from trainer.config.data import FIELDS, KINDS
from trainer.data.format.left_out import strings_of
from trainer.data.format.messages import read_tools, text_of, untrained
from trainer.errors import DataError

Row = dict[str, Any]
Result = TypeVar("Result")
Values = Mapping[str, Any]
"""The values of a row by the names that fields have here, without those that the row lacks."""

# Other names of fields than those that a format looks for by itself; they are proposed to the user.
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


# Fields that an answer may depend on, whatever else is in a row.
_KNOWN = ("system", "instruction", "context", "input", "history", "tools")
# A format that reads more fields than another, and what those of the other are called there.
_WIDER = {
    "chat": ("sharegpt", {}),
    "prompt_completion": ("alpaca", {"prompt": "instruction", "completion": "output"}),
    "question_answer": ("alpaca", {"question": "instruction", "answer": "output"}),
    "preference": ("preference_alpaca", {"prompt": "instruction"}),
    "labelled": ("labelled_alpaca", {"prompt": "instruction", "completion": "output"}),
}


@dataclass(frozen=True)
class RowFormat:
    """One format of rows.

    Attributes:
        fits: whether a row with these values is of the format.
        read: makes a row of the format's kind (see `KINDS`) of the values; None where the row is one already.
        needs: the fields without which `read` cannot do.
        names: names that rows give a field, where there are others than the field's own; the first is looked for first.
    """

    fits: Callable[[Values], bool]
    read: Callable[[Values], Row] | None = None
    needs: tuple[str, ...] = ()
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def called(self, name: str) -> tuple[str, ...]:
        return self.names.get(name, (name,))


def _is_text(*values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def _is_talk(*values: Any) -> bool:
    """Whether each value is a conversation: a list of objects with a role."""
    return all(
        isinstance(value, list) and value and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in value)
        for value in values
    )


def _is_label(value: Any) -> bool:
    return isinstance(value, bool) or value in ("true", "false", "True", "False")


def _fit_texts(*names: str) -> Callable[[Values], bool]:
    return lambda values: _is_text(*map(values.get, names))


def _fit_talks(*names: str) -> Callable[[Values], bool]:
    return lambda values: _is_talk(*map(values.get, names))


def _preference_fits(values: Values) -> bool:
    answers = values.get("chosen"), values.get("rejected")
    return _is_text(*answers) or _is_talk(*answers)


def _labelled_fits(values: Values) -> bool:
    both = values.get("prompt"), values.get("completion")
    return _is_label(values.get("label")) and (_is_text(*both) or _is_talk(*both))


def _ask(values: Values) -> list[dict[str, Any]]:
    """Alpaca's system message, history and question: the instruction, and the input on the next line."""
    asked = [text_of(values.get(name) or "", name) for name in ("instruction", "input")]
    messages = _with_system(values, [])
    history = values.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise DataError("the history is not a list of [question, answer]")
    for question, answer in history:
        messages += [_says("user", question), _says("assistant", answer)]
    return [*messages, _says("user", "\n".join(filter(None, asked)))]


def _says(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _with_system(values: Values, messages: list[Any]) -> list[Any]:
    """The messages after the system message that the row has beside them, if they do not begin with one."""
    system = values.get("system")
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if not system or "system" in (first.get("role"), first.get("from")):
        return messages
    return [_says("system", system), *messages]


def _tools(values: Values) -> Any:
    """The tools as chat templates want them: LLaMA-Factory's are the functions alone."""
    tools = read_tools(values.get("tools"))
    return tools and [tool if "type" in tool else {"type": "function", "function": tool} for tool in tools]


def _talk(values: Values, name: str = "messages") -> list[Any]:
    talk = values[name]
    if not isinstance(talk, list):
        raise DataError(f"{name}: this is of type {type(talk).__name__}, and not a list of messages")
    return talk


def _read_sharegpt(values: Values) -> Row:
    return {"messages": _with_system(values, _talk(values)), "tools": _tools(values)}


def _read_alpaca(values: Values) -> Row:
    return {"messages": [*_ask(values), _says("assistant", values["output"])]}


def _read_question(values: Values) -> Row:
    return {"messages": [_says("user", values["question"]), _says("assistant", values["answer"])]}


def _read_prompt_messages(values: Values) -> Row:
    prompt = [untrained(message) for message in _talk(values, "prompt")]
    return {"messages": [*prompt, *_talk(values, "completion")], "tools": values.get("tools")}


def _read_alpaca_pair(values: Values) -> Row:
    answers = {name: [_says("assistant", values[name])] for name in ("chosen", "rejected")}
    return {"prompt": _ask(values), **answers}


def _read_sharegpt_pair(values: Values) -> Row:
    answers = {name: [values[name]] for name in ("chosen", "rejected")}
    return {"prompt": _with_system(values, _talk(values)), **answers, "tools": _tools(values)}


def _read_labelled_alpaca(values: Values) -> Row:
    return {"prompt": _ask(values), "completion": [_says("assistant", values["output"])], "label": values["label"]}


def _read_labelled_messages(values: Values) -> Row:
    talk = _with_system(values, _talk(values))
    return {"prompt": talk[:-1], "completion": talk[-1:], "label": values["label"], "tools": _tools(values)}


_TALK_NAMES = {"messages": ("conversations", "conversation")}
_ALPACA_NAMES = {"input": ("input", "context"), "output": ("output", "response")}
_LABEL_NAMES = {"label": ("label", "kto_tag")}

# Of the formats that fit equally many of the first rows, the earlier one is taken.
FORMATS = {
    "chat": RowFormat(_fit_talks("messages")),
    "sharegpt": RowFormat(_fit_talks("messages"), _read_sharegpt, ("messages",), _TALK_NAMES),
    "alpaca": RowFormat(_fit_texts("instruction", "output"), _read_alpaca, ("instruction", "output"), _ALPACA_NAMES),
    "prompt_completion": RowFormat(
        _fit_texts("prompt", "completion"), names={"completion": ("completion", "response")}
    ),
    "prompt_completion_messages": RowFormat(
        _fit_talks("prompt", "completion"), _read_prompt_messages, ("prompt", "completion")
    ),
    "question_answer": RowFormat(_fit_texts("question", "answer"), _read_question, ("question", "answer")),
    "text": RowFormat(_fit_texts("text")),
    "preference_sharegpt": RowFormat(
        lambda values: _is_talk(values.get("messages"), [values.get("chosen")], [values.get("rejected")]),
        _read_sharegpt_pair,
        ("messages", "chosen", "rejected"),
        {"messages": ("conversations", "conversation", "messages")},
    ),
    "preference_alpaca": RowFormat(
        _fit_texts("instruction", "chosen", "rejected"),
        _read_alpaca_pair,
        ("instruction", "chosen", "rejected"),
        {"input": _ALPACA_NAMES["input"]},
    ),
    "preference": RowFormat(_preference_fits),
    "labelled_messages": RowFormat(
        lambda values: _is_talk(values.get("messages")) and _is_label(values.get("label")),
        _read_labelled_messages,
        ("messages", "label"),
        {"messages": ("messages", "conversations", "conversation"), **_LABEL_NAMES},
    ),
    "labelled_alpaca": RowFormat(
        lambda values: _fit_texts("instruction", "output")(values) and _is_label(values.get("label")),
        _read_labelled_alpaca,
        ("instruction", "output", "label"),
        {**_ALPACA_NAMES, **_LABEL_NAMES},
    ),
    "labelled": RowFormat(_labelled_fits, names=_LABEL_NAMES),
}


@dataclass(frozen=True)
class RowForm:
    """How the rows of a source are read: their format, and (field, name) where the row's name is not the format's first.

    `unread` are the fields that the rows had beside them when the form was found out.
    """

    format: str
    fields: tuple[tuple[str, str], ...] = ()
    unread: tuple[str, ...] = field(default=(), compare=False)

    @property
    def kind(self) -> str:
        return KINDS[self.format]

    @property
    def names(self) -> dict[str, str]:
        """The name in the row of each field of the format."""
        return {name: FORMATS[self.format].called(name)[0] for name in FIELDS[self.format]} | dict(self.fields)

    def read(self, row: Row) -> Row:
        """The row as one of its kind, whose fields `renderer_fields` renames. Raises `DataError` for a row of another format."""
        found = FORMATS[self.format]
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

    def messages(self, row: Row) -> Any:
        """The messages of the row, whatever they are; None where the format has none."""
        return row.get(self.names.get("messages", ""))

    def unused(self, row: Row) -> list[str]:
        """The fields of a row that its format has no use for."""
        used = set(self.names.values())
        return [name for name in row if name not in used]

    def __str__(self) -> str:
        named = ", ".join(dict.fromkeys(self.names.values()))
        return f"{self.format} ({named})"

    @property
    def overrides(self) -> str:
        """The settings that ask for this form, as on the command line."""
        return " ".join([f"data.format={self.format}", *(f"data.fields.{name}={given}" for name, given in self.fields)])


def explicit_form(data: Data) -> RowForm:
    """The form of all sources of a run that names its format."""
    assert data.format != "auto"
    return RowForm(data.format, tuple(sorted(data.fields.items())))


def form_of(row: Row, format: str, given: Mapping[str, str]) -> RowForm | None:
    """The form of a row of `format`, some of whose fields have a `given` name; None if the row is none of that format."""
    found, names = FORMATS[format], dict[str, str]()
    for name in FIELDS[format]:
        called = (given[name],) if name in given else found.called(name)
        names[name] = next((call for call in called if call in row), called[0])
    if not found.fits({name: row[call] for name, call in names.items() if call in row}):
        return None
    others = ((name, call) for name, call in names.items() if name in given or call != found.called(name)[0])
    return RowForm(format, tuple(sorted(others)))


def detect(rows: Sequence[Row], given: Mapping[str, str], kinds: Collection[str]) -> RowForm | None:
    """The form that most of the rows have, one of these `kinds` if there is any; None if they are of no format known here."""
    known = [format for format in FORMATS if given.keys() <= set(FIELDS[format])]
    for formats in ([f for f in known if KINDS[f] in kinds], [f for f in known if KINDS[f] not in kinds]):
        fitting = {format: [row for row in rows if form_of(row, format, given)] for format in formats}
        best = max(formats, key=lambda format: len(fitting[format]), default=None)
        if best is not None and fitting[best]:
            return _common_form(best, fitting[best], given)
    return None


def _common_form(format: str, rows: Sequence[Row], given: Mapping[str, str]) -> RowForm:
    """The form of rows of one format: each field has the name by which most of the rows say something, if any does."""
    fields = dict(given)
    for name in FIELDS[format]:
        called = FORMATS[format].called(name)
        most = max(called, key=lambda call: (sum(_says_something(row.get(call)) for row in rows), _holders(rows, call)))
        if name not in given and most != called[0]:
            fields[name] = most
    return RowForm(format, tuple(sorted(fields.items())))


def _says_something(value: Any) -> bool:
    return not (value is None or value in ("", [], {}))


def _holders(rows: Iterable[Row], name: str) -> int:
    return sum(name in row for row in rows)


def lost_fields(form: RowForm, rows: Iterable[Row]) -> list[str]:
    """The fields of known meaning that no part of the form reads, where a row of it says something there and nowhere else."""
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
    """A form that reads of these rows what `form` reads and the `lost` fields, too; None if there is none."""
    if form.format not in _WIDER:
        return None
    format, renamed = _WIDER[form.format]
    names = {renamed.get(name, name): call for name, call in form.names.items()}
    names |= {name: call for call in lost for name in FIELDS[format] if call in FORMATS[format].called(name)}
    given = {name: call for name, call in names.items() if call != FORMATS[format].called(name)[0]}
    wider = next((found for row in rows if (found := form_of(row, format, given))), None)
    return wider if wider and set(lost) <= set(wider.names.values()) else None


def or_error(read: Callable[[Row], Result], row: Row) -> Result | DataError:
    """The result of `read` for the row, or what is wrong with the row."""
    try:
        return read(row)
    except DataError as error:
        return error
    except RecursionError:
        return DataError("its values are nested too deeply")


def missing_field(row: Row, name: str, called: str, kind: str) -> DataError:
    """The error for a row without the field `name`, which it should have as `called`; proposes the setting that reads it."""
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
    """The settings for rows that were read: those of the form's kind."""
    return data.model_copy(update={"format": form.kind, "fields": form.renderer_fields})
