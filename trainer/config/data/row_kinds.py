"""The formats that rows may have, the kinds that they become, and the settings that suit each kind."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, Protocol

from trainer.config.registry import kinds


class RowFacts(Protocol):
    """The facts of a format of rows that settings are compared with. trainer/data/format/row_format.py says what they
    are.
    """

    @property
    def fields(self) -> tuple[str, ...]: ...
    @property
    def kind(self) -> str: ...
    @property
    def place(self) -> int: ...


# The formats of rows are files of trainer/data/format/known, which import nothing of the configuration: a new one is
# known here.
ROW_FORMATS: "dict[str, RowFacts]" = dict(
    sorted(
        kinds("trainer.data.format.known", "ROW_FORMATS").items(),
        key=lambda item: (item[1].place, item[0]),
    )
)
"""Every format that `data.format` may name, in the order in which rows are tried."""
if TYPE_CHECKING:
    Format = str
else:
    Format = Literal["auto", *ROW_FORMATS]
LIKELY = ("chat", "prompt_completion", "text", "segments", "answers")
"""The kinds of rows that have a likelihood of their own; those of the others are answers to be judged."""
PLAIN = ("prompt_completion", "text", "segments")
"""Those that no chat template writes."""
LOSS_ON = {
    "chat": ("assistant", "last_assistant", "all"),
    "prompt_completion": ("completion", "all"),
    "text": ("all",),
    "segments": (),
    "preference": ("completion",),
    "labelled": ("completion",),
    "answers": ("completion",),
    "classified": (),
    "multilabel": (),
    "tagged": (),
}
# Kinds of rows that are never split, and what a split would do.
WHOLE = {
    "preference": "part a pair",
    "labelled": "part an answer",
    "answers": "part an answer",
    "classified": "part a text from its class",
    "multilabel": "part a text from its classes",
    "tagged": "part words from their tags",
}
TWO_SEGMENTS = ("preference", "labelled", "tagged")
OF_CLASSES = ("classified", "multilabel", "tagged")
SHARING = ("preference", "labelled", "answers")
"""Kinds of rows with several answers to a prompt."""

TALKING = tuple(kind for kind in LOSS_ON if kind not in PLAIN)
# Settings of the section `data` that only rows of some kinds read: those kinds, and what the rows of the others are.
READ_BY: dict[str, tuple[tuple[str, ...], str]] = {
    "labels": (OF_CLASSES, ", whose rows have no class"),
    "share_prefix": (SHARING, ", whose rows have one answer to a prompt"),
    "drop_system": (("chat",), ", whose rows are no conversations to be learnt"),
    **dict.fromkeys(("thinking", "template", "today"), (TALKING, "")),
}


def kind_of(format: str) -> str:
    """The kind of rows that those of a format become; that of conversations where `format` is auto."""
    return ROW_FORMATS[format].kind if format in ROW_FORMATS else "chat"


def most_segments(format: str) -> int:
    """`Data.segments` of rows of this format."""
    return 2 if kind_of(format) in TWO_SEGMENTS else 1


def check_fields(setting: str, format: str, fields: Mapping[str, str]) -> None:
    for name in fields:
        if format != "auto" and name not in ROW_FORMATS[format].fields:
            raise ValueError(
                f"{setting}: {name!r} is not a field of data.format: {format}. Allowed there:"
                f" {', '.join(ROW_FORMATS[format].fields)}."
            )
