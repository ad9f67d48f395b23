"""The formats that rows may have, and the kinds that they become.

A format says how it is recognised, and how its rows become those of a kind. A kind says how its rows are tokenized,
which settings suit it, and which columns its documents have beside their tokens. A file of trainer/data/format/known
names its formats in `ROW_FORMATS` and its kinds in `ROW_KINDS`. The configuration reads both tables, so this file and
those import nothing of trainer.config, unless in a function.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
class Column:
    """Values that documents have beside their tokens: of numpy's `dtype`, one for each document, for each target, or
    for each token, in their order. Each value is an array of `shape`.

    They are stored, packed and given to the objective as they are, in `MicroBatch.columns`.
    """

    name: str
    dtype: str
    per: Literal["document", "target", "token"]
    shape: tuple[int, ...] = ()


TEMPLATED = ("thinking", "template", "today")
"""The settings of the section `data` that rows read which a chat template renders."""


@dataclass(frozen=True)
class RowKind:
    """One kind of rows.

    Attributes:
        renderer: makes the renderer of such rows (trainer/data/render/document.py), with a tokenizer and the section
            `data`.
        reads: the settings of `data` that only some kinds read, as trainer/config/data/row_kinds.py lists them.
        loss_on: the values that `data.loss_on` may have; none where rows say themselves what is trained.
        trained: the word for what is trained by default. It is part of a data set's fingerprint.
        fixed: why `data.loss_on` has no effect, where it has none, after "whose rows".
        parted: what a split of a row would part, for kinds whose rows are never split.
        segments: the segments of a row that one document is, at most.
        has_likelihood: whether a document is text with a likelihood of its own, and no answer to be judged.
        columns: those that each document has.
        counters: the counts of trainer/data/dataset/manifest.py that every data set of this kind has, be they 0.
        objective: an objective that learns from such rows, to propose.
    """

    renderer: Callable[[Any, Any], Any]
    reads: tuple[str, ...] = TEMPLATED
    loss_on: tuple[str, ...] = ()
    trained: str = "completion"
    fixed: str = "say themselves what is trained"
    parted: str = ""
    segments: int = 1
    has_likelihood: bool = False
    columns: tuple[Column, ...] = ()
    counters: tuple[str, ...] = ()
    objective: str = "sft"


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
