"""One format of rows: how it is recognised, and how its rows become those of the few kinds that are tokenized.

A file of trainer/data/format/known names its formats in `ROW_FORMATS`. The configuration reads these tables for the
names that `data.format` and `data.fields` may have, so this file and those import nothing of trainer.config.

Rows of the kinds `chat`, `prompt_completion`, `text`, `segments`, `preference`, `labelled` and `answers` are tokenized
as they are.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.data.format.messages import read_tools, text_of
from trainer.errors import DataError

Row = dict[str, Any]
Values = Mapping[str, Any]
"""The values of a row by the names that fields have here, without those that the row lacks."""
MESSAGES = ("messages", "conversations", "conversation")
"""The names that data sets give the field of a conversation."""
OPTIONAL = ("system", "history", "input", "tools")
"""The fields that a row may lack, in every format that has them."""


@dataclass(frozen=True)
class RowFormat:
    """One format of rows.

    Attributes:
        fields: the fields that it reads, as `data.fields` renames them.
        kind: the format that its rows become before they are tokenized; what is trained follows from it.
        fits: whether a row with these values is of the format.
        read: makes a row of the format's kind of the values; None where the row is one already.
        names: names that rows give a field, where there are others than the field's own; the first is looked for first.
        place: of the formats that fit equally many of the first rows, the one with the lowest place is taken.
        wider: a format that reads more fields than this one, and what those of this one are called there.
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
        """The fields without which `read` cannot do."""
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


# The parts that rows of several families are read into.


def ask(values: Values) -> list[dict[str, Any]]:
    """Alpaca's system message, history and question: the instruction, and the input on the next line."""
    asked = [text_of(values.get(name) or "", name) for name in ("instruction", "input")]
    messages = with_system(values, [])
    history = values.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise DataError("the history is not a list of [question, answer]")
    for question, answer in history:
        messages += [says("user", question), says("assistant", answer)]
    return [*messages, says("user", "\n".join(filter(None, asked)))]


def says(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def with_system(values: Values, messages: list[Any]) -> list[Any]:
    """The messages after the system message that the row has beside them, if they do not begin with one."""
    system = values.get("system")
    first = messages[0] if messages and isinstance(messages[0], dict) else {}
    if not system or "system" in (first.get("role"), first.get("from")):
        return messages
    return [says("system", system), *messages]


def tools(values: Values) -> Any:
    """The tools as chat templates want them: LLaMA-Factory's are the functions alone."""
    found = read_tools(values.get("tools"))
    return found and [tool if "type" in tool else {"type": "function", "function": tool} for tool in found]


def talk(values: Values, name: str = "messages") -> list[Any]:
    found = values[name]
    if not isinstance(found, list):
        raise DataError(f"{name}: this is of type {type(found).__name__}, and not a list of messages")
    return found
