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
            "The roles whose turns are trained. all: the whole text is trained. whole: like all, but only the"
            " completion of a prompt with a completion. Default: assistant; in formats without roles, the answer."
        ),
        example=["assistant", "tool"],
    )
    turns: Literal["all", "last"] = setting(
        "all", about="Train all turns of these roles, or only the last one.", example="last"
    )
    end: bool | Literal["last"] = setting(
        True,
        about=(
            "Train the token that ends a turn or a text (eos). last: only after the last trained turn. A model that"
            " never learns this token does not stop."
        ),
        example="last",
    )
    frame: bool | Literal["tail"] = setting(
        False,
        about=(
            "Also train the tokens that the chat template writes around an answer: the header before it, and the"
            " white space after it. tail: only the white space. If the template has {% generation %} tags, they"
            " decide instead."
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
                " Default: each rank reads the picture files where they are. Pictures that are stored inside rows are"
                " always copied."
            ),
            example=True,
        )
        root: str | None = setting(
            None,
            about=(
                "The folder or bucket to which the paths of pictures are relative. No path may lead out of it."
                " Default: the folder of the file with the rows."
            ),
            example="data/pictures",
            min_length=1,
        )
        allow_urls: bool = setting(
            False,
            about=(
                "Allow rows to name pictures by http or https addresses. Capstan downloads these pictures once, when"
                " it compiles the rows, and copies them into the compiled data."
            ),
            example=True,
        )
        max_pixels: int | None = setting(
            None,
            about=(
                "Largest number of pixels of a picture. Larger pictures are scaled down, in proportion, before the"
                " base's processor gets them. Default: only the processor's own limit."
            ),
            example=1_048_576,
            ge=16,
            le=2**27,
            unit="pixels",
        )
        min_pixels: int | None = setting(
            None,
            about="Smallest number of pixels of a picture. Smaller pictures are scaled up, in proportion.",
            example=3136,
            ge=16,
            le=2**24,
            unit="pixels",
        )

        read_ahead: int = setting(
            2**28,
            about=(
                "How many bytes of decoded pictures each rank may read in advance for its next steps. 0: it reads the"
                " pictures of a step when the step begins."
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

        def limited(self, size: tuple[int, int]) -> tuple[int, int]:
            """Height and width of a picture of this `size` that is made smaller or larger by `max_pixels` and
            `min_pixels`.

            The proportions stay, up to a pixel."""
            height, width = size
            most, least = self.max_pixels, self.min_pixels
            if most is not None and height * width > most:
                factor = (most / (height * width)) ** 0.5
                return _fitting(int(height * factor), most), _fitting(int(width * factor), most)
            if least is not None and height * width < least:
                factor = (least / (height * width)) ** 0.5
                return -int(-height * factor // 1), -int(-width * factor // 1)
            return size

        @property
        def decisive(self) -> dict[str, Any]:
            """The settings that decide the tokens of pictures, and where their bytes are."""
            given = self.model_dump(exclude={"read_ahead"}, exclude_defaults=True)
            if self.root is not None and "://" not in self.root:
                given["root"] = str(Path(self.root).expanduser().absolute())
            return given


class Videos(Section):
    """The videos of rows (`data.format: pictures`). The settings `root`, `copy`, `allow_urls` and `read_ahead` of
    `data.images` also apply to videos."""

    max_frames: int | None = setting(
        None,
        about=(
            "Largest number of frames of a video. Capstan takes them, evenly spaced, from the frames that the base's"
            " processor samples. Default: all frames that the processor samples, or 32 if it samples none by itself."
        ),
        example=16,
        ge=1,
        le=2**16 - 1,
        unit="frames",
    )
    max_pixels: int | None = setting(
        None,
        about=(
            "Largest number of pixels of a frame. Larger frames are scaled down, in proportion, before the base's"
            " processor gets them. Default: only the processor's own limit."
        ),
        example=65_536,
        ge=16,
        le=2**25,
        unit="pixels",
    )

    def limited(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of a frame of this `size` that is made smaller by `max_pixels`."""
        return Images(max_pixels=self.max_pixels).limited(size)


class Sounds(Section):
    """The sounds of rows (`data.format: pictures`). The settings `root`, `copy`, `allow_urls` and `read_ahead` of
    `data.images` also apply to sounds."""

    max_seconds: float | None = setting(
        None,
        about=(
            "Longest sound. A row with a longer one is bad (data.on_bad_row). Default: the longest sound that the"
            " base's processor takes without cutting it off."
        ),
        example=30.0,
        gt=0,
        le=14_400,
        unit="seconds",
    )


def _fitting(side: int, most: int) -> int:
    """A side of a picture that has at least a pixel, and of a very long picture no more than all of them."""
    return min(max(1, side), most)


class Data(Section):
    """The data to train and evaluate on: its sources, their format, and how documents become rows."""

    train: list[Source] = setting(about="Training sources.", example=[{"path": "data/train.jsonl"}], min_length=1)
    eval: list[Source] = setting(
        [], about="Evaluation sources. The run never trains on them.", example=[{"path": "data/eval.jsonl"}]
    )
    held_out: int | float = setting(
        0.0,
        about=(
            "Instead of eval: how many rows of data.train the run holds out for evaluation, as a number of rows or,"
            " below 1, as a share. A row's content decides, so equal rows are never divided between training and"
            " evaluation."
        ),
        example=0.01,
        ge=0,
        unit="rows or share of rows",
    )
    held_out_seed: Seed = setting(0, about="Seed of the choice of rows to hold out.", example=1)
    format: Format = setting(
        "auto",
        about=(
            "The format of the rows. auto: Capstan recognises it from the first rows of each source. Or one of these,"
            f" each with its fields: {_FORMATS}. docs/data-format.md has an example of each."
        ),
        example="chat",
    )
    fields: dict[str, str] = setting(
        {},
        about=(
            "If your rows use other field names than the format: the format's name (messages, tools, prompt,"
            " completion, text, chosen, rejected, label, ...), and your name for it."
        ),
        example={"messages": "dialogue"},
    )
    labels: list[str] | None = setting(
        None,
        about=(
            "For objective.name: classification, multilabel_classification and token_classification: the names of the"
            " classes, in the order of their numbers. Default: the sorted labels of data.train, which stay the same"
            " for all starts of the run."
        ),
        example=["negative", "positive"],
        min_length=2,
    )
    template: str | None = setting(
        None,
        about=(
            "A chat template to use instead of the tokenizer's, for instance for a base without a template: chatml,"
            " llama3, paligemma, gemma, mistral, phi3 or alpaca; or a Jinja template, as a path or as text."
            " docs/data-format.md says which template fits a base."
        ),
        example="chatml",
    )
    today: str = setting(
        "2025-01-01",
        about=(
            "The date that a chat template gets if it prints today's date (gpt-oss, Llama 3.1, ...). It is fixed, so"
            " that rows have the same tokens on every day."
        ),
        example="2026-06-30",
        unit="YYYY-MM-DD",
    )
    train_on: TrainOn = TrainOn()
    images: Images = Images()
    videos: Videos = Videos()
    sounds: Sounds = Sounds()
    thinking: Literal["as_template", "keep", "always", "strip"] = setting(
        "as_template",
        about=(
            "What happens to the assistant's thinking, in reasoning_content or <think> tags. as_template: the chat"
            " template decides; most keep it only in the last turn. keep: all turns keep it, in the template's own"
            " form. always: like keep, and a turn without thinking gets an empty block, which is not trained. strip:"
            " it is removed from all turns."
        ),
        example="strip",
    )
    system: str | None = setting(
        None,
        about=(
            "A system message for conversations without one. With drop_system it replaces the system messages of the"
            " rows."
        ),
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
        about=(
            "For pairs of a chosen and a rejected answer: most tokens of a prompt. A longer prompt loses its beginning."
        ),
        example=512,
        ge=1,
        le=2**20,
        unit="tokens",
    )
    packing: bool = setting(
        True, about="Put several documents into one row. Documents in a row never see each other.", example=True
    )
    share_prefix: bool = setting(
        False,
        about=(
            "If several answers share a prompt (the two answers of a pair, a labelled answer and its mismatched one,"
            " all answers of format `answers`), store the prompt only once in the row. Each answer sees the prompt"
            " and itself, so loss and gradients are the same with fewer tokens. Only for bases that mix tokens only"
            " by attention, with kernels that take a mask (sdpa, flex_attention, eager)."
        ),
        example=True,
    )
    tokenize_apart: bool = setting(
        False,
        about=(
            "Tokenize a prompt and its completion separately (and each segment of format segments), so that no token"
            " spans both. Default: they are tokenized as one text."
        ),
        example=True,
    )
    on_too_long: Literal["truncate", "split", "drop", "fail"] = setting(
        "truncate",
        about=(
            "What happens to a document longer than sequence_length. truncate: only its beginning is kept. split: it"
            " is cut into several documents. drop: it is left out. fail: the compilation ends with an error. Capstan"
            " counts such documents in any case."
        ),
        example="drop",
    )
    min_length: int = setting(
        0,
        about="Documents shorter than this are left out and counted.",
        example=16,
        ge=0,
        le=2**20,
        unit="tokens",
    )
    on_bad_row: Literal["fail", "skip"] = setting(
        "fail",
        about=(
            "What happens to a row that cannot be read. fail: the compilation ends with an error that names file and"
            " line. skip: the row is left out and counted."
        ),
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
                why = kind.unread.get(setting_, why)
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
