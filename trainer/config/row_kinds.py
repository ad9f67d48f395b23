"""The formats and kinds of rows that there are, and which settings suit them."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal

from trainer.config.registry import kinds

_KNOWN = "trainer.data.format.known"
# Both tables are in the files of trainer/data/format/known, which import nothing of the configuration: a new one is
# known here.
ROW_KINDS: dict[str, Any] = kinds(_KNOWN, "ROW_KINDS")
"""Every kind of rows; trainer/data/format/row_format.py says what one is."""
ROW_FORMATS: dict[str, Any] = dict(
    sorted(kinds(_KNOWN, "ROW_FORMATS").items(), key=lambda item: (item[1].place, item[0]))
)
"""Every format that `data.format` may name, in the order in which rows are tried."""
if TYPE_CHECKING:
    Format = str
else:
    Format = Literal["auto", *ROW_FORMATS]
LIKELY = tuple(name for name, kind in ROW_KINDS.items() if kind.has_likelihood)
"""The kinds of rows that have a likelihood of their own; those of the others are answers to be judged."""
# Settings of the section `data` that only rows of some kinds read, and what the rows of the others are.
READ_BY_SOME = {
    "labels": ", whose rows have no class",
    "share_prefix": ", whose rows have one answer to a prompt",
    "prompt_length": ", whose rows have no chosen and rejected answer",
    "tokenize_apart": ", whose rows have no such parts",
    "images": ", whose rows have no pictures",
    "videos": ", whose rows have no videos",
    "sounds": ", whose rows have no sounds",
    "drop_system": ", whose rows are no conversations to be learnt",
    **dict.fromkeys(("thinking", "template", "today", "system"), ""),
}


def is_templated(kind: str) -> bool:
    """Whether a chat template may render rows of this kind."""
    return "template" in ROW_KINDS[kind].reads


def kind_of(format: str) -> str:
    """The kind of rows that those of a format become; that of conversations where `format` is auto."""
    return ROW_FORMATS[format].kind if format in ROW_FORMATS else format if format in ROW_KINDS else "chat"


def most_segments(format: str) -> int:
    """`Data.segments` of rows of this format."""
    return ROW_KINDS[kind_of(format)].segments


def check_fields(setting: str, format: str, fields: Collection[str]) -> None:
    for name in fields:
        if format != "auto" and name not in ROW_FORMATS[format].fields:
            raise ValueError(
                f"{setting}: {name!r} is not a field of data.format: {format}. Allowed there:"
                f" {', '.join(ROW_FORMATS[format].fields)}."
            )
