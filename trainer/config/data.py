"""The settings of the data: its sources, their format, and how documents become rows."""

import warnings
from collections.abc import Collection
from datetime import date
from pathlib import Path
from typing import Any, Literal
from unicodedata import normalize

from pydantic import field_validator, model_validator

from trainer.config.row_kinds import (
    READ_BY_SOME,
    ROW_FORMATS,
    ROW_KINDS,
    Format,
    check_fields,
    is_templated,
    kind_of,
    most_segments,
)
from trainer.config.section import Section, Seed, setting
from trainer.config.source import Source

_WHOLE = ("chat", "pictures", "text")
"""The kinds of rows that `train_on.roles: whole` trains all of."""
_ROLES_OF_TEXT = (None, "all", "whole", ["assistant"])
"""The values of `train_on.roles` that have a meaning for rows without roles."""
_FORMATS = "; ".join(f"{name} ({', '.join(form.fields)})" for name, form in ROW_FORMATS.items())


class TrainOn(Section):
    """Which tokens are trained."""

    roles: Literal["all", "whole"] | list[Literal["system", "developer", "user", "assistant", "tool"]] | None = setting(
        None,
        about=(
            "The roles whose turns are trained; all trains the whole text; whole trains all of a conversation or"
            " text, but only the completion of a prompt. Default: assistant, or the answer in formats without"
            " roles."
        ),
        example=["assistant", "tool"],
    )
    turns: Literal["all", "last"] = setting(
        "all", about="All turns of these roles, or the last one of them.", example="last"
    )
    end: bool | Literal["last"] = setting(
        True,
        about=(
            "Train the token that ends a turn, or a text (eos). last: only the one after the last trained turn. A"
            " model that never learns this token does not stop."
        ),
        example="last",
    )
    frame: bool | Literal["tail"] = setting(
        False,
        about=(
            "Also train what the chat template writes around an answer: the header before it, and the white space"
            " after its end. tail: only the white space. A template with {% generation %} tags decides this"
            " itself."
        ),
        example=True,
    )
    thinking: bool = setting(True, about="Also train the assistant's thinking.", example=False)


with warnings.catch_warnings():
    # The name is that of a method of pydantic's classes, which is deprecated and used nowhere here.
    warnings.filterwarnings("ignore", 'Field name "copy"')

    class Images(Section):
        """The pictures of rows (`data.format: pictures`)."""

        copy: bool = setting(  # pyright: ignore[reportIncompatibleMethodOverride]
            False,
            about=(
                "Copy the bytes of all pictures into the compiled data, so that ranks read them from run.store."
                " Otherwise files stay where they are, and each rank reads them there. Pictures inside rows are always"
                " copied."
            ),
            example=True,
        )
        root: str | None = setting(
            None,
            about=(
                "The folder or bucket that the paths of pictures begin at. No path may lead out of it. Default: the"
                " folder of the file with the rows."
            ),
            example="data/pictures",
            min_length=1,
        )
        allow_urls: bool = setting(
            False,
            about=(
                "Fetch pictures that a row names by an address on the web (http, https). They are fetched once, when"
                " the rows are compiled, and copied."
            ),
            example=True,
        )
        max_pixels: int | None = setting(
            None,
            about=(
                "Make larger pictures smaller before the base's processor gets them, so that they have at most so many"
                " pixels. Their proportions stay. Default: the processor alone decides."
            ),
            example=1_048_576,
            ge=16,
            le=2**27,
            unit="pixels",
        )
        min_pixels: int | None = setting(
            None,
            about="Make smaller pictures larger, so that they have at least so many pixels.",
            example=3136,
            ge=16,
            le=2**24,
            unit="pixels",
        )

        read_ahead: int = setting(
            2**28,
            about=(
                "Bytes of decoded pictures that each rank may hold ready for its next steps. 0: the pictures of a step"
                " are read when it begins."
            ),
            example=2**30,
            ge=0,
            le=2**32,
            unit="bytes",
        )

        @model_validator(mode="after")
        def _ordered(self) -> "Images":
            if self.max_pixels and self.min_pixels and self.min_pixels > self.max_pixels:
                raise ValueError(
                    f"data.images.min_pixels: {self.min_pixels} is more than data.images.max_pixels, {self.max_pixels}."
                    " Lower it."
                )
            return self

        @property
        def decisive(self) -> dict[str, Any]:
            """The settings that decide the tokens of pictures, and where their bytes are."""
            given = self.model_dump(exclude={"read_ahead"}, exclude_defaults=True)
            if self.root is not None and "://" not in self.root:
                given["root"] = str(Path(self.root).expanduser().absolute())
            return given


class Data(Section):
    """The data to train and evaluate on: its sources, their format, and how documents become rows."""

    train: list[Source] = setting(about="Training sources.", example=[{"path": "data/train.jsonl"}], min_length=1)
    eval: list[Source] = setting(
        [], about="Sources that are evaluated but never trained on.", example=[{"path": "data/eval.jsonl"}]
    )
    held_out: int | float = setting(
        0.0,
        about=(
            "Training rows that are evaluated instead of trained on: their number, or below 1 their share. The choice"
            " depends on content, so equal rows stay together. Instead of eval."
        ),
        example=0.01,
        ge=0,
        unit="rows or share of rows",
    )
    held_out_seed: Seed = setting(0, about="Seed of the choice of rows to hold out.", example=1)
    format: Format = setting(
        "auto",
        about=(
            f"auto: found out for each source by its first rows. Or one of these, with its fields: {_FORMATS}."
            " docs/data-format.md has an example of each."
        ),
        example="chat",
    )
    fields: dict[str, str] = setting(
        {},
        about=(
            "Names of the fields in your rows, if they differ from the format's, such as messages, tools, prompt,"
            " completion, text, chosen, rejected and label."
        ),
        example={"messages": "dialogue"},
    )
    labels: list[str] | None = setting(
        None,
        about=(
            "The names of the classes, in the order of their numbers, for objective.name: classification,"
            " multilabel_classification and token_classification. Default: the sorted labels of data.train, which the"
            " run keeps."
        ),
        example=["negative", "positive"],
        min_length=2,
    )
    template: str | None = setting(
        None,
        about=(
            "Chat template that replaces the tokenizer's, for instance for a base without one: chatml, llama3, gemma,"
            " mistral, phi3 or alpaca, or a Jinja template, as its path or its text. docs/data-format.md says which one"
            " fits."
        ),
        example="chatml",
    )
    today: str = setting(
        "2025-01-01",
        about=(
            "The date for chat templates that print today's date (gpt-oss, Llama 3.1, ...), so that rows have the same"
            " tokens on every day."
        ),
        example="2026-06-30",
        unit="YYYY-MM-DD",
    )
    train_on: TrainOn = TrainOn()
    images: Images = Images()
    thinking: Literal["as_template", "keep", "always", "strip"] = setting(
        "as_template",
        about=(
            "What happens to the assistant's thinking, in reasoning_content or <think> tags. as_template: the chat"
            " template decides, usually for the last turn only. keep: all turns have it, in the template's own form."
            " always: as keep, and a turn without any has an empty block, which is not trained. strip: no turn has it."
        ),
        example="strip",
    )
    system: str | None = setting(
        None,
        about="System message of conversations that have none. With drop_system it replaces that of the rows.",
        example="You are a helpful assistant.",
        min_length=1,
    )
    drop_system: bool = setting(
        False, about="Leave out a system message at the beginning of a conversation.", example=True
    )
    sequence_length: int = setting(
        2048,
        about="Length of a packed row, without virtual tokens.",
        example=8192,
        ge=8,
        le=2**20,
        unit="tokens",
    )
    prompt_length: int | None = setting(
        None,
        about="Longest prompt, in tokens, of a chosen and a rejected answer. A longer prompt loses its beginning.",
        example=512,
        ge=1,
        le=2**20,
        unit="tokens",
    )
    packing: bool = setting(True, about="Put several documents into one row; they never see each other.", example=True)
    share_prefix: bool = setting(
        False,
        about=(
            "If several answers follow one prompt (the two of a pair, a labelled and its mismatched one, all of"
            " `answers`), hold the prompt once in a row. Each answer sees the prompt and itself, so loss and gradients"
            " are the same with fewer tokens. Only for bases whose layers mix tokens by attention alone, with kernels"
            " that take a mask (sdpa, flex_attention, eager)."
        ),
        example=True,
    )
    tokenize_apart: bool = setting(
        False,
        about=(
            "Tokenize a prompt and its completion, or each of the segments, by itself and not as one text, so that no"
            " token lies in both."
        ),
        example=True,
    )
    on_too_long: Literal["truncate", "split", "drop", "fail"] = setting(
        "truncate",
        about=(
            "What happens to a document longer than sequence_length. truncate keeps its beginning, split makes"
            " documents of its pieces, drop leaves it out, and fail ends the compilation. It is counted in any"
            " case."
        ),
        example="drop",
    )
    min_length: int = setting(
        0,
        about="Shorter documents are dropped and counted.",
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
                    f"data.fields: {unknown[0]!r} is not a field of any data.format. Allowed are"
                    f" {', '.join(sorted(known))}."
                )
            return self
        check_fields("data.fields", self.format, self.fields)
        if unsuited := self.unsuited(self.format):
            raise ValueError(unsuited)
        return self

    def unsuited(self, format: str) -> str | None:
        """Return a sentence about a setting that does not go with rows of this format, if there is one."""
        name, kind = ROW_FORMATS[format].kind, ROW_KINDS[ROW_FORMATS[format].kind]
        for setting_, why in READ_BY_SOME.items():
            if setting_ not in kind.reads and getattr(self, setting_) != Data.model_fields[setting_].default:
                return f"data.{setting_}: has no effect with data.format: {format}{why}. Remove it."
        if unread := self._unread_by(name):
            why = f", whose rows {kind.fixed}" if kind.fixed and not kind.roles else ""
            return f"{unread}: has no effect with data.format: {format}{why}. Remove it."
        if kind.parted and self.on_too_long == "split":
            return (
                f"data.on_too_long: split would part {kind.parted} of data.format: {format}. Set it to truncate, drop"
                " or fail."
            )
        return None

    def for_rows(self, format: str) -> "Data":
        """Return the settings for rows of this format. Settings of what is trained, of thinking and of the template
        that such rows do not use have their defaults.
        """
        kind, on = ROW_KINDS[ROW_FORMATS[format].kind], self.train_on
        talks = "template" in kind.reads
        roles = on.roles if kind.roles and (talks or on.roles in _ROLES_OF_TEXT) else None
        kept: dict[str, Any] = {
            "train_on": on.model_copy(update={"roles": roles}) if talks else TrainOn(roles=roles, end=on.end),
            **{name: Data.model_fields[name].default for name in READ_BY_SOME if name not in kind.reads},
        }
        return self.model_copy(update=kept)

    def _unread_by(self, name: str) -> str | None:
        """Return a setting of `train_on` that is set and has no meaning for rows of this kind; None if there is
        none."""
        on, kind = self.train_on, ROW_KINDS[name]
        if not is_templated(name) and on.frame:
            return "data.train_on.frame"
        if name != "chat" and on.turns != "all":
            return "data.train_on.turns"
        if not kind.roles and on.roles is not None:
            return "data.train_on.roles"
        if "labels" in kind.reads and not (on.end and on.thinking):
            return "data.train_on"
        if not is_templated(name) and on.roles not in _ROLES_OF_TEXT:
            return "data.train_on.roles"
        return None if is_templated(name) or on.thinking else "data.train_on.thinking"

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
        if labels and len({normalize("NFC", name) for name in labels}) < len(labels):
            raise ValueError("data.labels: names a class twice. Name each once.")
        return labels

    @model_validator(mode="after")
    def _consistent(self) -> "Data":
        if self.min_length > self.sequence_length:
            raise ValueError(
                f"data.min_length: {self.min_length} is more than data.sequence_length, {self.sequence_length}, so that"
                " nothing is left. Lower it."
            )
        if (roles := self.train_on.roles) in ("all", "whole") and self.train_on.turns != "all":
            raise ValueError(f"data.train_on.turns: last has no effect with roles: {roles}. Name roles, or remove it.")
        if self.train_on.roles == []:
            raise ValueError("data.train_on.roles: [] leaves nothing to train. Name a role, or remove it.")
        if self.held_out > 1 and self.held_out % 1:
            raise ValueError(
                f"data.held_out: {self.held_out:g} is not allowed. Give a whole number of rows, or a share of them"
                " below 1. Example: 0.01."
            )
        if isinstance(self.held_out, float) and self.held_out == 1:
            raise ValueError("data.held_out: 1.0 leaves nothing to train on. Give a share below 1, or 1 for one row.")
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
                f"data.train: the fractions {', '.join(map(str, fractions))} leave nothing to the other sources. Their"
                " sum must be below 1, and one source needs a weight in place of a fraction."
            )
        for index, source in enumerate(self.eval):
            if source.weight != 1.0 or source.fraction is not None:
                raise ValueError(
                    f"data.eval[{index}]: weight and fraction have no effect, every document is evaluated once. Remove"
                    " them."
                )
        return self

    @property
    def too_long_remedies(self) -> str:
        """The other values of `on_too_long` that a row may be refused with."""
        return "truncate or drop" if ROW_KINDS[self.kind].parted else "truncate, split or drop"

    @property
    def kind(self) -> str:
        """The kind of rows that the format becomes; conversations if `format` is auto."""
        return kind_of(self.format)

    def segments(self, kinds: Collection[str]) -> int:
        """Return the most segments of a row that one document can be. A pair of answers is two; so are a labelled and a
        mismatched answer, and words and tags. If the format is still to be found, rows may be of any of `kinds`, from
        which the objective learns."""
        return max(map(most_segments, kinds)) if self.format == "auto" else most_segments(self.format)

    @property
    def wanted(self) -> TrainOn:
        """`train_on` for rows of this kind. Its `whole` becomes either all or the default."""
        whole = {"roles": "all" if self.kind in _WHOLE else None} if self.train_on.roles == "whole" else {}
        return self.train_on.model_copy(update=whole)

    @property
    def targets(self) -> str:
        """The word for what `train_on` says, if there is one, or for its default in the format."""
        if self.wanted.roles == "all":
            return "all"
        if self.kind == "chat" and self.train_on.turns == "last":
            return "last_assistant"
        return ROW_KINDS[self.kind].trained

    @property
    def beyond_targets(self) -> dict[str, Any]:
        """The settings that decide the text or what of it is trained, without those that `targets` names. Earlier
        versions had other words for thinking, and made other tokens of it."""
        on, roles = self.train_on, self.train_on.roles
        found = {
            "roles": None if roles in _ROLES_OF_TEXT else sorted(roles or ()),
            "end": None if on.end is True else on.end,
            "frame": on.frame or None,
            "apart": True if self.tokenize_apart else None,
            "thinking": None if on.thinking else "untrained",
            "blocks": {"keep": "kept", "always": "always", "strip": "stripped"}.get(self.thinking),
            "labels": self.labels,
            "share_prefix": True if self.share_prefix else None,
            "drop_system": True if self.drop_system else None,
            "system": self.system,
            "min_length": self.min_length or None,
            "prompt_length": self.prompt_length,
        }
        return {name: value for name, value in found.items() if value is not None}
