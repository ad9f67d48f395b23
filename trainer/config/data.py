"""The settings of the data: its sources, their format, and how documents become rows."""

from collections.abc import Mapping
from datetime import date
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator, model_validator

from trainer.config.registry import kinds
from trainer.config.section import Section, setting

if TYPE_CHECKING:
    from trainer.data.format.row_format import RowFormat

# The formats of rows are files of trainer/data/format/known, which import nothing of the configuration: a new one is known here.
ROW_FORMATS: "dict[str, RowFormat]" = dict(
    sorted(
        kinds(import_module("trainer.data.format.known"), "ROW_FORMATS").items(),
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
_LOSS_ON = {
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
_TODAY = "2025-01-01"
# Kinds of rows that are never split, and what a split would do.
_WHOLE = {
    "preference": "part a pair",
    "labelled": "part an answer",
    "answers": "part an answer",
    "classified": "part a text from its class",
    "multilabel": "part a text from its classes",
    "tagged": "part words from their tags",
}
_TWO_SEGMENTS = ("preference", "labelled", "tagged")
_OF_CLASSES = ("classified", "multilabel", "tagged")
_SHARING = ("preference", "labelled", "answers")
"""Kinds of rows with several answers to a prompt."""


class Source(Section):
    """One place that documents come from."""

    path: str = setting(
        about="A file or a glob: .jsonl, .json, .csv, .tsv, .txt (a text a line; also .gz, .zst), .parquet, .arrow or .mds; or the folder of a saved HF data set "
        "or of MDS shards. Local, or s3://, gs://, az://. Or a data set of the Hugging Face Hub: hf://owner/name, with @revision or a file behind it.",
        example="data/train-*.jsonl",
    )
    weight: float = setting(
        1.0,
        about="How often an epoch visits each document: 2 is twice, 0.5 a different half of them each epoch.",
        example=0.5,
        gt=0,
        le=1000,
        unit="visits an epoch",
    )
    fraction: float | None = setting(
        None,
        about="Instead of weight: the share of an epoch's tokens that comes from this source, such as general data mixed in "
        "so that the model keeps what it knew (replay).",
        example=0.1,
        gt=0,
        lt=1,
        unit="share of tokens",
    )
    format: Format | None = setting(
        None, about="The format of this source's rows, where it is not data.format.", example="alpaca"
    )
    fields: dict[str, str] = setting(
        {},
        about="Names of the fields in this source's rows; those of data.fields hold beside them unless the source has a format.",
        example={"messages": "dialogue"},
    )

    subset: str | None = setting(
        None,
        about="Which configuration of a data set of the Hub. Default: the one that it names as such.",
        example="en",
    )
    split: str | None = setting(None, about="Which split of a data set of the Hub. Default: train.", example="test")
    take: int | float | None = setting(
        None,
        about="So many of its rows, or below 1 that share of them: the first ones. Default: all.",
        example=1000,
        gt=0,
        unit="rows, or share of rows",
    )
    take_seed: int | None = setting(
        None, about="Take a random choice by this seed, not the first rows.", example=42, ge=0, lt=2**32
    )

    @model_validator(mode="after")
    def _taken(self) -> "Source":
        if self.take is not None and self.take > 1 and self.take % 1:
            raise ValueError(
                f"take: {self.take:g} is not allowed. Give a whole number of rows, or a share of them below 1. Example: 0.01."
            )
        if isinstance(self.take, float) and self.take == 1:
            raise ValueError("take: 1.0 is not allowed. Leave it out for all rows, or give 1 for a single one.")
        if self.take_seed is not None and self.take is None:
            raise ValueError("take_seed: has no effect without take. Set that, or remove it.")
        return self

    @model_validator(mode="after")
    def _of_the_hub(self) -> "Source":
        for name in ("subset", "split"):
            if getattr(self, name) is not None and not self.path.startswith("hf://"):
                raise ValueError(f"{name}: has no effect on {self.path!r}, which is not of the Hub (hf://). Remove it.")
        return self

    @model_validator(mode="after")
    def _known_fields(self) -> "Source":
        if self.format:
            _check_fields("fields", self.format, self.fields)
        return self

    @model_validator(mode="after")
    def _one_measure(self) -> "Source":
        if self.fraction is not None and self.weight != 1.0:
            raise ValueError("weight and fraction: both given. Set one of them.")
        return self


class TrainOn(Section):
    """Which tokens are trained, more finely than data.loss_on says it."""

    roles: Literal["all"] | list[Literal["system", "developer", "user", "assistant", "tool"]] | None = setting(
        None,
        about="The roles whose turns are trained, or all for the whole text. Default: assistant, and the answer where there are no roles.",
        example=["assistant", "tool"],
    )
    turns: Literal["all", "last"] = setting(
        "all", about="All turns of these roles, or the last one of them.", example="last"
    )
    end: bool = setting(
        True,
        about="Train the token that ends a turn, or a text (eos). Without it a model does not learn to stop.",
        example=False,
    )
    thinking: bool = setting(True, about="Train what assistants thought before they answered, too.", example=False)


class Data(Section):
    """The data to train and evaluate on: its sources, their format, and how documents become rows."""

    train: list[Source] = setting(about="Training sources.", example=[{"path": "data/train.jsonl"}], min_length=1)
    eval: list[Source] = setting(
        [], about="Sources that are evaluated but never trained on.", example=[{"path": "data/eval.jsonl"}]
    )
    held_out: float = setting(
        0.0,
        about="Share of the training rows that is evaluated instead of trained on, chosen by content, so that equal rows stay "
        "together. Instead of eval.",
        example=0.01,
        ge=0,
        lt=1,
        unit="share of rows",
    )
    held_out_seed: int = setting(0, about="Chooses other rows to hold out.", example=1, ge=0, lt=2**32)
    format: Format = setting(
        "auto",
        about="auto: found out for each source by its first rows. Conversations: chat (messages), sharegpt (conversations), alpaca "
        "(instruction, output), question_answer, prompt_completion_messages. Strings: prompt_completion, text, segments. Answers to compare: "
        "preference. Answers with a label: labelled. Several answers to a prompt, all trained: answers. Texts or conversations with a class: classified, classified_messages; with several: multilabel, multilabel_messages. Words with tags: tagged. "
        "docs/data-format.md has an example of each.",
        example="chat",
    )
    fields: dict[str, str] = setting(
        {},
        about="Names of the fields in your rows, where they differ from those of the format, such as messages, tools, prompt, completion, "
        "text, chosen, rejected and label.",
        example={"messages": "dialogue"},
    )
    labels: list[str] | None = setting(
        None,
        about="The names of the classes, in the order of their numbers, for objective.name: classification, multilabel_classification and token_classification. Default: those of the rows of "
        "data.train, sorted; the run keeps them.",
        example=["negative", "positive"],
        min_length=2,
    )
    template: str | None = setting(
        None,
        about="Instead of the tokenizer's own chat template, such as for a base that has none: chatml, llama3, gemma, mistral or phi3, or the "
        "path of a Jinja file. docs/data-format.md says which fits.",
        example="chatml",
    )
    today: str = setting(
        _TODAY,
        about="The day that chat templates print which print today's date (gpt-oss, Llama 3.1, ...), so that rows are the same "
        "tokens on every day.",
        example="2026-06-30",
        unit="YYYY-MM-DD",
    )
    loss_on: Literal["assistant", "last_assistant", "completion", "all"] | None = setting(
        None,
        about="Which tokens are trained. Default: assistant in conversations, completion for prompt_completion, answers, preference and labelled, all for "
        "text.",
        example="last_assistant",
    )
    train_on: TrainOn = TrainOn()
    thinking: Literal["as_template", "keep", "strip"] = setting(
        "as_template",
        about="The thinking of assistants, in reasoning_content or <think> tags. as_template: in the text as the chat template writes it, "
        "mostly in the last turn alone; keep: in all turns, in the template's own form; strip: in none.",
        example="strip",
    )
    drop_system: bool = setting(
        False, about="Leave out the system message that a conversation begins with.", example=True
    )
    sequence_length: int = setting(
        2048,
        about="Length of a packed row, without what virtual tokens take.",
        example=8192,
        ge=8,
        le=2**20,
        unit="tokens",
    )
    packing: bool = setting(True, about="Put several documents into one row; they never see each other.", example=True)
    share_prefix: bool = setting(
        False,
        about="Hold a prompt once in a row where several answers to it follow: the two of a pair, a labelled and its mismatched one, all of `answers`. "
        "Each sees the prompt and itself, so that loss and gradients are the same, of fewer tokens. For bases whose layers mix tokens by attention "
        "alone, and kernels that take a mask (sdpa, flex_attention, eager).",
        example=True,
    )
    on_too_long: Literal["truncate", "split", "drop", "fail"] = setting(
        "truncate",
        about="What happens to a document longer than sequence_length; it is counted either way. split makes documents of "
        "its pieces.",
        example="drop",
    )
    min_length: int = setting(
        0,
        about="Documents that are shorter are dropped, and counted.",
        example=16,
        ge=0,
        le=2**20,
        unit="tokens",
    )
    on_bad_row: Literal["fail", "skip"] = setting(
        "fail",
        about="What happens to a row that cannot be read: fail names file and line, skip counts it.",
        example="skip",
    )

    @model_validator(mode="after")
    def _suits_its_format(self) -> "Data":
        if self.format == "auto":
            known = {name for form in ROW_FORMATS.values() for name in form.fields}
            if unknown := [name for name in self.fields if name not in known]:
                raise ValueError(
                    f"data.fields: {unknown[0]!r} is not a field of any data.format. Allowed are {', '.join(sorted(known))}."
                )
            return self
        _check_fields("data.fields", self.format, self.fields)
        if unsuited := self.unsuited(self.format):
            raise ValueError(unsuited)
        return self

    def unsuited(self, format: str) -> str | None:
        """A sentence for a setting that rows of this format do not go with, if there is one."""
        kind = ROW_FORMATS[format].kind
        if self.labels and kind not in _OF_CLASSES:
            return f"data.labels: has no effect with data.format: {format}, whose rows have no class. Remove it."
        if self.loss_on and not _LOSS_ON[kind]:
            what = "say themselves what is trained" if kind == "segments" else "have a class, which is trained"
            return f"data.loss_on: has no effect with data.format: {format}, whose rows {what}. Remove it."
        if self.loss_on and self.loss_on not in _LOSS_ON[kind]:
            return (
                f"data.loss_on: {self.loss_on!r} does not exist in data.format: {format}. "
                f"Allowed there: {', '.join(_LOSS_ON[kind])}."
            )
        if self.share_prefix and kind not in _SHARING:
            return f"data.share_prefix: has no effect with data.format: {format}, whose rows have one answer to a prompt. Remove it."
        if self.drop_system and kind != "chat":
            return f"data.drop_system: has no effect with data.format: {format}, whose rows are no conversations to be learnt. Remove it."
        if unread := self._unread_by(kind):
            return f"{unread}: has no effect with data.format: {format}. Remove it."
        if kind in PLAIN:
            for name, changed in (("template", self.template is not None), ("today", self.today != _TODAY)):
                if changed:
                    return f"data.{name}: has no effect with data.format: {format}. Remove it."
        if kind in _WHOLE and self.on_too_long == "split":
            return f"data.on_too_long: split would {_WHOLE[kind]} of data.format: {format}. Set it to truncate, drop or fail."
        return None

    def for_rows(self, format: str) -> "Data":
        """The settings with those alone of what is trained, of thinking and of the template that rows of this format have a use for."""
        kind, on = ROW_FORMATS[format].kind, self.train_on
        talks = kind not in PLAIN
        roles = on.roles if talks or on.roles in (None, "all", ["assistant"]) else None
        kept: dict[str, Any] = {
            "loss_on": self.loss_on if self.loss_on in _LOSS_ON[kind] else None,
            "train_on": on if talks else TrainOn(roles=roles, end=on.end),
            "thinking": self.thinking if talks else "as_template",
            "template": self.template if talks else None,
            "today": self.today if talks else _TODAY,
            "labels": self.labels if kind in _OF_CLASSES else None,
            "share_prefix": self.share_prefix and kind in _SHARING,
            "drop_system": self.drop_system and kind == "chat",
        }
        return self.model_copy(update=kept)

    def _unread_by(self, kind: str) -> str | None:
        """A setting of `train_on`, or `thinking`, that has no meaning for rows of a kind."""
        on = self.train_on
        if kind != "chat" and on.turns != "all":
            return "data.train_on.turns"
        if kind in (*_WHOLE, "segments") and on.roles is not None:
            return "data.train_on.roles"
        if kind in _OF_CLASSES and not (on.end and on.thinking):
            return "data.train_on"
        if kind in ("prompt_completion", "text") and on.roles not in (None, "all", ["assistant"]):
            return "data.train_on.roles"
        if kind in PLAIN and not on.thinking:
            return "data.train_on.thinking"
        return "data.thinking" if kind in PLAIN and self.thinking != "as_template" else None

    @field_validator("today")
    @classmethod
    def _is_a_day(cls, today: str) -> str:
        try:
            return date.fromisoformat(today).isoformat()
        except ValueError as error:
            raise ValueError(f"data.today: {today!r} is no day. Write it as YYYY-MM-DD.") from error

    @field_validator("labels")
    @classmethod
    def _each_class_once(cls, labels: list[str] | None) -> list[str] | None:
        if labels and len(set(labels)) < len(labels):
            raise ValueError("data.labels: names a class twice. Name each once.")
        return labels

    @model_validator(mode="after")
    def _room(self) -> "Data":
        if self.min_length > self.sequence_length:
            raise ValueError(
                f"data.min_length: {self.min_length} is more than data.sequence_length, {self.sequence_length}, so that nothing is left. Lower it."
            )
        return self

    @model_validator(mode="after")
    def _said_once(self) -> "Data":
        if self.loss_on and (self.train_on.roles is not None or self.train_on.turns != "all"):
            raise ValueError("data.loss_on and data.train_on: both given. Set the second, which says more.")
        if self.train_on.roles == "all" and self.train_on.turns != "all":
            raise ValueError("data.train_on.turns: last has no effect with roles: all. Name roles, or remove it.")
        if self.train_on.roles == []:
            raise ValueError("data.train_on.roles: [] leaves nothing to train. Name a role, or remove it.")
        return self

    @model_validator(mode="after")
    def _held_out(self) -> "Data":
        if self.held_out and self.eval:
            raise ValueError("data.held_out and data.eval: both given. Set one of them.")
        if self.held_out_seed and not self.held_out:
            raise ValueError("data.held_out_seed: has no effect without data.held_out. Set that, or remove it.")
        return self

    @model_validator(mode="after")
    def _fractions(self) -> "Data":
        fractions = [source.fraction for source in self.train if source.fraction is not None]
        if fractions and (len(fractions) == len(self.train) or sum(fractions) >= 1):
            raise ValueError(
                f"data.train: the fractions {', '.join(map(str, fractions))} leave nothing to the other sources. Their sum "
                "must be below 1, and one source needs a weight in place of a fraction."
            )
        for index, source in enumerate(self.eval):
            if source.weight != 1.0 or source.fraction is not None:
                raise ValueError(
                    f"data.eval[{index}]: weight and fraction have no effect, every document is evaluated once. Remove them."
                )
        return self

    @property
    def too_long_remedies(self) -> str:
        """The other values of `on_too_long` that a row may be refused with."""
        return "truncate or drop" if self.kind in _WHOLE else "truncate, split or drop"

    @property
    def kind(self) -> str:
        """The format that the rows become; that of conversations where `format` is auto."""
        return kind_of(self.format)

    @property
    def segments(self) -> int:
        """Segments of a row that one document is, at most: a pair of answers is two, and so are a labelled and a mismatched one,
        and words and tags."""
        return most_segments(self.format)

    @property
    def wanted(self) -> TrainOn:
        """`train_on`, or what `loss_on` says in its words."""
        said = {
            "all": {"roles": "all"},
            "assistant": {"roles": ["assistant"]},
            "last_assistant": {"roles": ["assistant"], "turns": "last"},
        }
        return self.train_on.model_copy(update=said.get(self.loss_on or "", {}))

    @property
    def targets(self) -> str:
        """`loss_on`, or the word for what `train_on` says as far as there is one, or its default for the format."""
        if self.loss_on or self.train_on.roles == "all":
            return self.loss_on or "all"
        if self.kind == "chat" and self.train_on.turns == "last":
            return "last_assistant"
        return {"chat": "assistant", "text": "all", "segments": "segments", **dict.fromkeys(_OF_CLASSES, "label")}.get(
            self.kind, "completion"
        )

    @property
    def beyond_targets(self) -> dict[str, Any]:
        """Whatever decides what is trained, or what the text is, and `targets` has no word for. Earlier versions had other words for
        thinking, of which they made other tokens."""
        on, roles = self.train_on, self.train_on.roles
        found = {
            "roles": None if roles in (None, "all", ["assistant"]) else sorted(roles or ()),
            "end": None if on.end else False,
            "thinking": None if on.thinking else "untrained",
            "blocks": {"keep": "kept", "strip": "stripped"}.get(self.thinking),
            "labels": self.labels,
            "share_prefix": True if self.share_prefix else None,
            "drop_system": True if self.drop_system else None,
            "min_length": self.min_length or None,
        }
        return {name: value for name, value in found.items() if value is not None}


def kind_of(format: str) -> str:
    """The kind of rows that those of a format become; that of conversations where `format` is auto."""
    return ROW_FORMATS[format].kind if format in ROW_FORMATS else "chat"


def most_segments(format: str) -> int:
    """`Data.segments` of rows of this format."""
    return 2 if kind_of(format) in _TWO_SEGMENTS else 1


def _check_fields(setting: str, format: str, fields: Mapping[str, str]) -> None:
    for name in fields:
        if format != "auto" and name not in ROW_FORMATS[format].fields:
            raise ValueError(
                f"{setting}: {name!r} is not a field of data.format: {format}. Allowed there: {', '.join(ROW_FORMATS[format].fields)}."
            )
