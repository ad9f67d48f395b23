"""The interfaces of a row format and of a row kind.

A format says how Capstan recognises it, and how its rows are converted to a kind. A kind says how its rows are
tokenized, which settings apply to it, and which columns its documents have beside their tokens. A file of
trainer/data/format/known lists its formats in `ROW_FORMATS` and its kinds in `ROW_KINDS`. The configuration reads both
tables, so this file and those import trainer.config only inside functions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.data.format.messages import read_tools, text_of
from trainer.errors import DataError

Row = dict[str, Any]
Values = Mapping[str, Any]
"""The values of a row by the format's names of the fields. Fields that the row lacks are left out."""
MESSAGES = ("messages", "conversations", "conversation")
"""The names that data sets use for the field of a conversation."""
OPTIONAL = ("system", "history", "input", "tools")
"""The fields that a row may lack, in every format that has them."""


@dataclass(frozen=True)
class Column:
    """Values that documents have beside their tokens: one for each document, target or token, in their order.

    Each value is an array of `shape` with numpy's `dtype`. Capstan stores and packs the values unchanged, and the
    objective finds them in `MicroBatch.columns`. A column for each picture has as many values for a document as its
    column `pictures` says.
    """

    name: str
    dtype: str
    per: Literal["document", "target", "token", "picture"]
    shape: tuple[int, ...] = ()


COUNTED, PICTURES = "pictures", "picture"
"""The column of documents that says how many values each has in a column for each picture, and the one such column."""


TEMPLATED = ("thinking", "template", "today", "system")
"""The settings of the section `data` that apply to rows which a chat template renders."""


@dataclass(frozen=True)
class RowKind:
    """One kind of rows.

    Attributes:
        renderer: makes the renderer of such rows (trainer/data/render/document.py) from a tokenizer and the section
            `data`.
        reads: the settings of `data` that only some kinds read, as trainer/config/row_kinds.py lists them.
        unread: why it does not read one of these settings, if not for the reason that trainer/config/row_kinds.py has.
        roles: whether `data.train_on.roles` chooses what is trained.
        trained: the word for what is trained by default. It is part of a data set's fingerprint.
        fixed: why `data.train_on` has no effect, if there is a reason to tell; the clause continues "whose rows".
        parted: what a split of a row would separate, for kinds whose rows are never split.
        segments: the largest number of segments of a packed row that one document takes.
        has_likelihood: whether a document is text whose likelihood is meaningful, and not an answer to be judged.
        columns: the columns that each document has.
        counters: the counts of trainer/data/dataset/manifest.py that every data set of this kind has, even if they
            are 0.
        objective: an objective that learns from such rows, to propose to the user.
        sees: whether its documents have pictures, for which a run loads its base's tower.
    """

    renderer: Callable[[Any, Any], Any]
    reads: tuple[str, ...] = TEMPLATED
    unread: Mapping[str, str] = field(default_factory=dict)
    roles: bool = False
    trained: str = "completion"
    fixed: str = ""
    parted: str = ""
    segments: int = 1
    has_likelihood: bool = False
    columns: tuple[Column, ...] = ()
    counters: tuple[str, ...] = ()
    objective: str = "sft"
    sees: bool = False


@dataclass(frozen=True)
class RowFormat:
    """One format of rows.

    Attributes:
        fields: the fields that it reads, as `data.fields` renames them.
        kind: the kind that its rows are converted to before they are tokenized. It decides what is trained.
        fits: whether a row with these values has the format.
        read: converts the values to a row of the kind; None if the row already is one.
        names: other names that rows use for a field, in the order in which they are looked for.
        place: the priority among formats that fit equally many of the first rows; the lowest wins.
        wider: a format that reads more fields than this one, and its names for the fields of this one.
    """

    fields: tuple[str, ...]
    kind: str
    fits: Callable[[Values], bool]
    read: Callable[[Values], Row] | None = None
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    place: int = 100
    wider: tuple[str, Mapping[str, str]] | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """The fields that `read` requires."""
        return tuple(name for name in self.fields if name not in OPTIONAL)

    def called(self, name: str) -> tuple[str, ...]:
        return self.names.get(name, (name,))


def is_text(*values: Any) -> bool:
    return all(isinstance(value, str) for value in values)


def is_talk(*values: Any) -> bool:
    """Whether each value is a conversation: a list of objects with a role."""
    return all(
        isinstance(value, list) and value and all(isinstance(m, dict) and ("role" in m or "from" in m) for m in value)
        for value in values
    )


def is_label(value: Any) -> bool:
    return isinstance(value, bool) or value in ("true", "false", "True", "False")


def fit_texts(*names: str) -> Callable[[Values], bool]:
    return lambda values: is_text(*map(values.get, names))


def fit_talks(*names: str) -> Callable[[Values], bool]:
    return lambda values: is_talk(*map(values.get, names))


# Functions that several families of formats share.


def ask(values: Values) -> list[dict[str, Any]]:
    """Alpaca's system message, history and question: the instruction, with the input on the next line."""
    asked = [text_of(values.get(name) or "", name) for name in ("instruction", "input")]
    messages = with_system(values, [])
    history = values.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise DataError("the history is not a list of [question, answer]")
    for question, answer in history:
        messages += [says("user", question), says("assistant", answer)]
    question = says("user", "\n".join(filter(None, asked)))
    return [*messages, {**question, "input": asked[1]} if all(asked) else question]


def says(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def with_system(values: Values, messages: list[Any]) -> list[Any]:
    """Put the row's separate system message before the messages, unless they begin with one."""
    system = values.get("system")
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if not system or "system" in (first.get("role"), first.get("from")):
        return messages
    return [says("system", system), *messages]


def tools(values: Values) -> Any:
    """The tools in the form of chat templates. LLaMA-Factory's rows have only the functions, without their type."""
    found = read_tools(values.get("tools"))
    return found and [tool if "type" in tool else {"type": "function", "function": tool} for tool in found]


def talk(values: Values, name: str = "messages") -> list[Any]:
    found = values[name]
    if not isinstance(found, list):
        raise DataError(f"{name}: this is of type {type(found).__name__}, and not a list of messages")
    return found
