"""One source of the data: where its documents are, how often they are visited, and how its rows are read."""

from pydantic import model_validator

from trainer.config.row_kinds import Format, check_fields
from trainer.config.section import Section, setting
from trainer.config.written import check_replaced, check_template


class Source(Section):
    """One source of documents."""

    path: str = setting(
        about=(
            "A file or a glob: .jsonl, .json, .csv, .tsv, .txt (one text a line), .tar (WebDataset), also with .gz or"
            " .zst, .parquet, .arrow or .mds; or the folder of a saved HF data set or of MDS shards. Local, or s3://,"
            " gs://, az://. Or a data set of the Hugging Face Hub: hf://owner/name, with @revision or a file after it."
        ),
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
        about=(
            "Instead of weight: this source's share of an epoch's tokens, for instance of general data that keeps what"
            " the model knew (replay)."
        ),
        example=0.1,
        gt=0,
        lt=1,
        unit="share of tokens",
    )
    format: Format | None = setting(
        None, about="The format of this source's rows, if it differs from data.format.", example="alpaca"
    )
    fields: dict[str, str] = setting(
        {},
        about=(
            "Names of the fields in this source's rows. Those of data.fields also apply, unless the source has a"
            " format."
        ),
        example={"messages": "dialogue"},
    )
    replace: dict[str, str] = setting(
        {},
        about=(
            "Texts that are replaced in every text of this source's rows before they are read, such as"
            " placeholders for a name. A text that begins with re: is a regular expression, and \\1 in its"
            " replacement is its first group."
        ),
        example={"{{NAME}}": "Capstan"},
    )
    write: dict[str, str | list[str]] = setting(
        {},
        about=(
            "Fields of the format that are written from the row's own: {name} is a field, {name.part.0} what is inside"
            " it, {name[other]} the item whose number is in another. Given several templates, Capstan takes the first"
            " one whose fields all have a text. Needs the source's format."
        ),
        example={"prompt": "Question: {question} Answer: ", "completion": "{answers.text.0}"},
    )
    without: dict[str, str | list[str]] = setting(
        {},
        about="Rows to leave out: those in which a field is this text, or one of these. take and skip count them too.",
        example={"source": "toxic-dpo-v0.2"},
    )
    subset: str | None = setting(
        None,
        about="Configuration of a data set of the Hub. Default: the one that the data set calls default.",
        example="en",
    )
    split: str | None = setting(None, about="Split of a data set of the Hub. Default: train.", example="test")
    take: int | float | None = setting(
        None,
        about="Number of rows to take, or below 1 the share of the rows: the first ones. Default: all.",
        example=1000,
        gt=0,
        unit="rows, or share of rows",
    )
    skip: int = setting(
        0,
        about="Number of rows to leave out, before those that are taken. With take_seed, of the random order.",
        example=1000,
        ge=0,
        unit="rows",
    )
    take_seed: int | None = setting(
        None, about="Take a random choice of rows by this seed instead of the first ones.", example=42, ge=0, lt=2**32
    )

    @property
    def templates(self) -> dict[str, tuple[str, ...]]:
        """The templates of `write` by their fields."""
        return {name: (given,) if isinstance(given, str) else tuple(given) for name, given in self.write.items()}

    @property
    def left_out(self) -> dict[str, tuple[str, ...]]:
        """The texts of `without` by their fields."""
        return {name: (given,) if isinstance(given, str) else tuple(given) for name, given in self.without.items()}

    @model_validator(mode="after")
    def _consistent(self) -> "Source":
        if self.take is not None and self.take > 1 and self.take % 1:
            raise ValueError(
                f"take: {self.take:g} is not allowed. Give a whole number of rows, or a share of them below 1. Example:"
                " 0.01."
            )
        if isinstance(self.take, float) and self.take == 1:
            raise ValueError("take: 1.0 is not allowed. Leave it out for all rows, or give 1 for a single one.")
        if self.take_seed is not None and self.take is None and not self.skip:
            raise ValueError("take_seed: has no effect without take. Set that, or remove it.")
        for name in ("subset", "split"):
            if getattr(self, name) is not None and not self.path.startswith("hf://"):
                raise ValueError(f"{name}: has no effect on {self.path!r}, which is not of the Hub (hf://). Remove it.")
        if "" in self.replace:
            raise ValueError("replace: an empty text cannot be replaced. Name the text, such as '{{NAME}}'.")
        for text, other in self.replace.items():
            if wrong := check_replaced(text, other):
                raise ValueError(f"replace: {text!r}: {wrong}.")
        for name, given in self.write.items():
            if not self.format:
                raise ValueError("write: needs a format, of which its fields are. Set the source's format.")
            check_fields("write", self.format, self.write)
            for template in self.templates[name]:
                if wrong := check_template(template):
                    raise ValueError(f"write.{name}: {template!r}: {wrong}.")
            if not given:
                raise ValueError(f"write.{name}: has no template. Give one, or remove it.")
        if self.format:
            check_fields("fields", self.format, self.fields)
        if self.fraction is not None and self.weight != 1.0:
            raise ValueError("weight and fraction: both given. Set one of them.")
        return self
