"""The settings of the evaluation: what is measured beside the training loss, during a run and by `capstan evaluate`."""

from typing import Any

from pydantic import field_validator, model_validator

from trainer.config.data import Data
from trainer.config.row_kinds import LIKELY, Format, check_fields, kind_of
from trainer.config.section import Section, Steps, TokenCount, setting

UNNAMED = "eval"
"""The name that the evaluation data of `data.eval` or `data.held_out` has beside those of `eval.sets`."""


def split_of(name: str = UNNAMED) -> str:
    """The name that records and manifests of data have for the evaluation data of this name."""
    return name if name == UNNAMED else f"eval.sets.{name}"


class EvalSet(Section):
    """One named evaluation set: where its rows are, and their format if it differs from that of the training data."""

    path: str = setting(
        about="A file, a glob, a folder or a URI, as in data.eval.",
        example="data/general-*.jsonl",
    )
    format: Format | None = setting(
        None, about="The format of the set's rows, or auto. Default: data.format.", example="text"
    )
    fields: dict[str, str] = setting(
        {},
        about=(
            "Names of the fields in the set's rows, as in data.fields. Default: data.fields, if the format is the same."
        ),
        example={"text": "content"},
    )

    def data(self, data: Data) -> Data:
        """Return the section `data` of a run that trains on this set alone. Settings that suit the format are kept.

        Raises:
            ValueError: a field is not one of the format.
        """
        form = self.format or data.format
        changes: dict[str, Any] = {
            "train": [{"path": self.path}],
            "eval": [],
            "held_out": 0.0,
            "held_out_seed": 0,
            "format": form,
            "fields": self.fields or (data.fields if form == data.format else {}),
        }
        kept = data if form == "auto" else data.for_rows(form)
        return Data.model_validate({**kept.model_dump(), **changes})


class Evaluation(Section):
    """A run measures more than its training loss. During the training, it measures the loss on data.eval or
    data.held_out, and the loss on each set of eval.sets. `capstan evaluate` measures these losses too, and runs the
    tasks and the bias pairs.
    """

    every: Steps = setting(
        0,
        about="Evaluate every N steps, before the first step and at the end. 0: only at the end.",
        example=100,
    )
    per_epoch: float = setting(
        0,
        about=(
            "Instead of every: evaluate N times in each pass over the training data, at even distances, the last time"
            " at the end of the pass; and before the first step. `capstan plan` lists the steps."
        ),
        example=4,
        ge=0,
        le=10_000,
        unit="evaluations an epoch",
    )
    sets: dict[str, EvalSet] = setting(
        {},
        about=(
            "Further evaluation sets by name. Each has a loss of its own. Use one for instance with general data, to"
            " measure what the model forgets."
        ),
        example={"general": {"path": "data/general.jsonl", "format": "text"}},
    )
    tasks: list[str] = setting(
        [],
        about="Tasks of lm-evaluation-harness that `capstan evaluate` runs: names, YAML files, or folders of them.",
        example=["tasks/our-questions.yaml"],
    )
    bias: str | None = setting(
        None,
        about=(
            "For `capstan evaluate`: pairs of sentences that differ only in the word for a group of people, as JSONL"
            " with the fields group and pair."
        ),
        example="examples/bias-pairs.jsonl",
    )
    prompts: str | None = setting(
        None,
        about=(
            "Prompts for `capstan generate` and train.sample_every: JSON or JSONL with the field prompt or messages in"
            " each object, or a text file with one prompt on each line."
        ),
        example="data/prompts.jsonl",
        min_length=1,
    )
    max_tokens: TokenCount = setting(
        128, about="Most tokens of an answer to a prompt while the run trains.", example=64
    )

    @property
    def between(self) -> bool:
        """Whether anything is evaluated before the run's end."""
        return self.every > 0 or self.per_epoch > 0

    @model_validator(mode="after")
    def _said_once(self) -> "Evaluation":
        if self.every and self.per_epoch:
            raise ValueError("eval.every and eval.per_epoch: both given. Set one of them.")
        return self

    @field_validator("sets")
    @classmethod
    def _names(cls, sets: dict[str, EvalSet]) -> dict[str, EvalSet]:
        for name, given in sets.items():
            if name == UNNAMED or not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(
                    f"eval.sets: {name!r} is not allowed as a name. Use letters, digits, '-' and '_', and not"
                    f" {UNNAMED!r}, which is the data of data.eval."
                )
            check_fields(f"eval.sets.{name}.fields", given.format or "auto", given.fields)
        return sets

    def mismatches(self, data: Data) -> list[str]:
        """A sentence for each set that cannot be read beside this section `data`."""
        judged = [name for name, given in self.sets.items() if kind_of(given.format or data.format) not in LIKELY]
        return [
            f"eval.sets.{name}.format: rows of data.format: {self.sets[name].format or data.format} have no likelihood."
            " Set it to auto, or the format of conversations, of prompts and completions or of texts."
            for name in judged
        ]
