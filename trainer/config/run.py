"""The life of a run: its name and place, when it is saved, how often it starts again, how long a rank may take, and
where its curves are shown.
"""

from typing import Annotated, Any, Literal

from pydantic import field_validator, model_validator

from trainer.config.registry import OneOf
from trainer.config.section import Seconds, Section, Seed, Steps, setting

SHARED_FOLDERS = ("bases", "data", "environments")  # beside the runs in a store; trainer/run/layout.py


class Run(Section):
    """The name of the run and its place."""

    name: str = setting(
        about="Name of the run, and of its folder in the store. Letters, digits, '.', '_' and '-'.",
        example="llama-8b-support",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
    )
    store: str = setting(
        "runs",
        about="Folder or URI (s3://, gs://, az://) that keeps runs, compiled data and checkpoints.",
        example="s3://bucket/runs",
    )
    store_retry: Seconds = setting(
        120,
        about="How long a failing request to a bucket is repeated, with growing pauses, before it counts as failed.",
        example=600,
    )
    store_timeout: Seconds = setting(
        60,
        about="How long one request to a bucket may take. Uploads go in parts of 32 MiB, four at a time.",
        example=300,
    )
    seed: Seed = setting(0, about="Seed of the data order, of the adapter's start and of dropout.", example=7)

    @field_validator("name")
    @classmethod
    def _not_the_stores_own(cls, name: str) -> str:
        if name in SHARED_FOLDERS:
            raise ValueError(
                f"run.name: {name!r} is not allowed. The store keeps what runs share in a folder of this name. Choose"
                " another."
            )
        return name


class Checkpoint(Section):
    """When training state is committed to the store, and which checkpoints are kept."""

    every_steps: Steps = setting(
        100,
        about="Commit every N steps. 0 turns this rule off, and so does per_epoch unless this is given.",
        example=100,
    )
    per_epoch: float = setting(
        0,
        about=(
            "Commit N times in each pass over the training data, at even distances and at its end. 0 turns this"
            " rule off."
        ),
        example=1,
        ge=0,
        le=10_000,
        unit="commits an epoch",
    )
    every_minutes: float = setting(
        30,
        about="Commit when this time has passed since the last commit. 0 turns this rule off.",
        example=15,
        ge=0,
        unit="minutes",
    )
    keep_last: int = setting(3, about="Number of newest checkpoints to keep.", example=3, ge=1, unit="checkpoints")
    keep_every: Steps = setting(
        0, about="Also keep every checkpoint whose step is a multiple of this; 0 keeps none.", example=1000
    )
    keep_best: int = setting(
        0,
        about=(
            "Number of checkpoints with the lowest evaluation loss to keep as well. The run then commits after"
            " every evaluation. 0 keeps none."
        ),
        example=2,
        ge=0,
        unit="checkpoints",
    )
    adapters: bool = setting(
        False,
        about=(
            "Write each commit also as a PEFT adapter, `checkpoints/step-.../adapter/`, in a process of its own beside"
            " the training. It is removed with its checkpoint. Not for tuning.method: full, which has no adapter."
        ),
        example=True,
    )
    when_busy: Literal["wait", "skip"] = setting(
        "wait",
        about=(
            "What happens to a save that is due while the previous one is still being uploaded: it waits, or it is"
            " skipped. The metrics record how long and how often."
        ),
        example="skip",
    )
    failed_saves: int = setting(
        3,
        about=(
            "Number of saves in a row that may fail before the run ends with exit code 6. The first and the last save"
            " of a start must not fail."
        ),
        example=0,
        ge=0,
        unit="saves",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_rule(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("per_epoch") and "every_steps" not in given:
            return {**given, "every_steps": 0}
        return given


class Retry(Section):
    """How often a run starts again by itself."""

    failures: int = setting(
        3,
        about=(
            "Restarts after a crash before the run gives up. Configuration and data errors are never retried, and a"
            " second crash at the same step ends the run."
        ),
        example=3,
        ge=0,
        unit="restarts",
    )
    preemptions: int | None = setting(
        None,
        about=(
            "Restarts after a machine was taken away or lost, counted separately from crashes. Default: any number."
        ),
        example=20,
        ge=0,
        unit="restarts",
    )
    skip_bad_window: bool = setting(
        True,
        about=(
            "After a loss that is not finite, go back to the last commit and leave that step's rows out, once. Without"
            " this, or the second time, the run ends with exit code 5."
        ),
        example=False,
    )
    slow_rank: Literal["name", "replace"] = setting(
        "name",
        about=(
            "What follows when a rank is slower than the others for a while. `name`: the log, `capstan status` and the"
            " report name the rank and its machine. `replace` also starts the run again after its next commit on other"
            " machines; for `capstan submit slurm`, and for Ray clusters with more than one machine."
        ),
        example="replace",
    )


class Timeouts(Section):
    """How long a rank may take over one thing before it counts as hanging. It is then named, and the ranks
    start again.
    """

    meet: Seconds = setting(
        900, about="How long all ranks may take to come together after torchrun or srun has started them.", example=300
    )
    load: Seconds = setting(
        3600, about="How long loading the model and restoring its checkpoint may take.", example=1800
    )
    step: Seconds = setting(900, about="How long one step, one step's data, or one evaluation may take.", example=300)
    save: Seconds = setting(3600, about="How long waiting until a checkpoint is committed may take.", example=900)


class Track(Section):
    """Where metrics go, in addition to the run's folder."""

    tensorboard: bool = setting(
        True, about="Write TensorBoard events into the run's folder, once a minute.", example=True
    )
    trackers: list[Annotated[str, OneOf("trainer.run.trackers", "SERVICES")]] = setting(
        [],
        about=(
            "Services that show the curves, each an extra. Addresses and keys come from the"
            " environment. One that fails never ends the run. See docs/tracking.md."
        ),
        example=["wandb", "mlflow"],
    )
    project: str = setting(
        "capstan",
        about="The project (W&B, trackio) or experiment (MLflow) of the run.",
        example="support-bot",
        min_length=1,
        max_length=100,
    )
    name: str | None = setting(
        None, about="The run's name there. Default: run.name.", example="8b, rank 16", min_length=1, max_length=100
    )
    group: str | None = setting(None, about="Groups runs there.", example="rank-ablation", min_length=1, max_length=100)
    tags: list[str] = setting([], about="The run's tags there.", example=["lora", "8b"])
    print_steps: Steps = setting(
        10,
        about=(
            "Print a line every N steps, in rank 0's log and, without a terminal, by `capstan train`. 0 prints none."
        ),
        example=1,
    )
    price_per_gpu_hour: float | None = setting(
        None,
        about=(
            "The price of one GPU for an hour, in your money. `capstan status` and `report` then show the cost of the"
            " run."
        ),
        example=2.5,
        ge=0,
        unit="money",
    )
    flush_seconds: Seconds = setting(
        5.0,
        about=(
            "How often metrics and grown logs are written to the store. A rank that prints a lot sends its log less"
            " often."
        ),
        example=10,
    )

    @model_validator(mode="after")
    def _shown_somewhere(self) -> "Track":
        for name in ("project", "name", "group", "tags"):
            if not self.trackers and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"track.{name}: has no effect without track.trackers. Name some there, or remove it.")
        return self
