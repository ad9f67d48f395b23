"""One source of the data: where its documents are, how often they are visited, and how its rows are read."""

from pydantic import model_validator

from trainer.config.data.row_kinds import Format, check_fields
from trainer.config.section import Section, setting


class Source(Section):
    """One place that documents come from."""

    path: str = setting(
        about=(
            "A file or a glob: .jsonl, .json, .csv, .tsv, .txt (a text a line; also .gz, .zst), .parquet, .arrow or"
            " .mds; or the folder of a saved HF data set or of MDS shards. Local, or s3://, gs://, az://. Or a data set"
            " of the Hugging Face Hub: hf://owner/name, with @revision or a file behind it."
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
            "Instead of weight: the share of an epoch's tokens that comes from this source, such as general data mixed"
            " in so that the model keeps what it knew (replay)."
        ),
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
        about=(
            "Names of the fields in this source's rows; those of data.fields hold beside them unless the source has a"
            " format."
        ),
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
    def _consistent(self) -> "Source":
        if self.take is not None and self.take > 1 and self.take % 1:
            raise ValueError(
                f"take: {self.take:g} is not allowed. Give a whole number of rows, or a share of them below 1. Example:"
                " 0.01."
            )
        if isinstance(self.take, float) and self.take == 1:
            raise ValueError("take: 1.0 is not allowed. Leave it out for all rows, or give 1 for a single one.")
        if self.take_seed is not None and self.take is None:
            raise ValueError("take_seed: has no effect without take. Set that, or remove it.")
        for name in ("subset", "split"):
            if getattr(self, name) is not None and not self.path.startswith("hf://"):
                raise ValueError(f"{name}: has no effect on {self.path!r}, which is not of the Hub (hf://). Remove it.")
        if self.format:
            check_fields("fields", self.format, self.fields)
        if self.fraction is not None and self.weight != 1.0:
            raise ValueError("weight and fraction: both given. Set one of them.")
        return self
