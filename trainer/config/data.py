"""The settings of the data: its sources, their format, and how documents become rows."""

from typing import Literal

from pydantic import model_validator

from trainer.config.section import Section, setting

FIELDS = {
    "chat": ("messages", "tools"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "preference": ("prompt", "chosen", "rejected", "tools"),
    "labelled": ("prompt", "completion", "label", "tools"),
}
"""The fields of a row by `data.format`, as `data.fields` renames them."""


class Source(Section):
    """One place that documents come from."""

    path: str = setting(
        about="A file or a glob: .jsonl (also .gz, .zst), .parquet, .arrow or .mds; or the folder of a saved HF data set or of MDS "
        "shards. Local, or s3://, gs://, az://.",
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

    @model_validator(mode="after")
    def _one_measure(self) -> "Source":
        if self.fraction is not None and self.weight != 1.0:
            raise ValueError("weight and fraction: both given. Set one of them.")
        return self


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
    format: Literal["chat", "prompt_completion", "text", "preference", "labelled"] = setting(
        "chat",
        about="chat: a list of messages; prompt_completion: two strings; text: one string; preference: a chosen and a rejected "
        "answer to one prompt, as messages or strings; labelled: a prompt, a completion and a label, true for a desired one.",
        example="chat",
    )
    fields: dict[str, str] = setting(
        {},
        about="Names of the fields in your rows, where they differ from messages, tools, prompt, completion, text, chosen, rejected and label.",
        example={"messages": "conversations"},
    )
    template: str | None = setting(
        None, about="A Jinja chat template file, instead of the tokenizer's own.", example="template.jinja"
    )
    loss_on: Literal["assistant", "last_assistant", "completion", "all"] | None = setting(
        None,
        about="Which tokens are trained. Default: assistant for chat, completion for prompt_completion, preference and labelled, all for text.",
        example="last_assistant",
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
    on_too_long: Literal["truncate", "split", "drop", "fail"] = setting(
        "truncate",
        about="What happens to a document longer than sequence_length; it is counted either way. split makes documents of "
        "its pieces.",
        example="drop",
    )
    on_bad_row: Literal["fail", "skip"] = setting(
        "fail",
        about="What happens to a row that cannot be read: fail names file and line, skip counts it.",
        example="skip",
    )

    @model_validator(mode="after")
    def _targets(self) -> "Data":
        allowed = {
            "chat": ("assistant", "last_assistant", "all"),
            "prompt_completion": ("completion", "all"),
            "text": ("all",),
            "preference": ("completion",),
            "labelled": ("completion",),
        }
        if self.loss_on and self.loss_on not in allowed[self.format]:
            raise ValueError(
                f"data.loss_on: {self.loss_on!r} does not exist in data.format: {self.format}. "
                f"Allowed there: {', '.join(allowed[self.format])}."
            )
        for name in self.fields:
            if name not in FIELDS[self.format]:
                raise ValueError(
                    f"data.fields: {name!r} is not a field of data.format: {self.format}. Allowed there: "
                    f"{', '.join(FIELDS[self.format])}."
                )
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

    @model_validator(mode="after")
    def _template(self) -> "Data":
        if self.template and self.format not in ("chat", "preference", "labelled"):
            raise ValueError(f"data.template: has no effect with data.format: {self.format}. Remove it.")
        return self

    @model_validator(mode="after")
    def _whole_answers(self) -> "Data":
        judged = {"preference": "part a pair", "labelled": "part an answer"}
        if self.format in judged and self.on_too_long == "split":
            raise ValueError(
                f"data.on_too_long: split would {judged[self.format]} of data.format: {self.format}. Set it to truncate, drop or fail."
            )
        return self

    @property
    def too_long_remedies(self) -> str:
        """The other values of `on_too_long` that a row may be refused with."""
        return "truncate or drop" if self.format in ("preference", "labelled") else "truncate, split or drop"

    @property
    def segments(self) -> int:
        """Segments of a row that one document is, at most: a pair of answers is two, and so are a labelled and a mismatched one."""
        return 2 if self.format in ("preference", "labelled") else 1

    @property
    def targets(self) -> str:
        """`loss_on`, or its default for the format."""
        defaults = {"chat": "assistant", "text": "all"}
        return self.loss_on or defaults.get(self.format, "completion")
