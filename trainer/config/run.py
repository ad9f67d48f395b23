"""The life of a run: its name and place, when it is saved, how often it starts again, how long a rank may take, and
where its curves are shown.
"""

from typing import Annotated, Any, Literal

from pydantic import field_validator, model_validator

from trainer.config.registry import OneOf
from trainer.config.section import Seconds, Section, Seed, Steps, setting

SHARED_FOLDERS = ("bases", "data", "environments")  # beside the runs in a store; trainer/run/layout.py


class Run(Section):
    """The name of the run, and the store that keeps it."""

    name: str = setting(
        about=(
            "Name of the run, and of its folder in the store: up to 100 letters, digits, '.', '_' and '-', of which the"
            " first is a letter or a digit."
        ),
        example="llama-8b-support",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
    )
    store: str = setting(
        "runs",
        about="The store: a folder or URI (s3://, gs://, az://) for runs, compiled data and checkpoints.",
        example="s3://bucket/runs",
    )
    store_retry: Seconds = setting(
        120,
        about="How long Capstan repeats a failing request to a bucket, with growing pauses, before it gives up.",
        example=600,
    )
    store_timeout: Seconds = setting(
        60,
        about="Time limit of one request to a bucket. Large files are uploaded in parts of 32 MiB, four at a time.",
        example=300,
    )
    seed: Seed = setting(0, about="Seed of the data order, of the adapter's initial weights and of dropout.", example=7)

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
    """When the run commits a checkpoint to the store, and which checkpoints it keeps."""

    every_steps: Steps = setting(
        100,
        about=(
            "Commit a checkpoint every N steps. 0 turns this rule off. If you set per_epoch and not this, this rule"
            " is off, too."
        ),
        example=100,
    )
    per_epoch: float = setting(
        0,
        about=(
            "Commit N times in each pass over the training data, at even distances, the last time at the end of the"
            " pass. 0 turns this rule off."
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
        0, about="Also keep every checkpoint whose step is a multiple of this. 0 keeps none of them.", example=1000
    )
    keep_best: int = setting(
        0,
        about=(
            "Also keep this number of checkpoints with the lowest evaluation loss. The run then commits after every"
            " evaluation. 0 keeps none of them."
        ),
        example=2,
        ge=0,
        unit="checkpoints",
    )
    adapters: bool = setting(
        False,
        about=(
            "Also write each committed checkpoint as a PEFT adapter, into `checkpoints/step-.../adapter/`. A separate"
            " process does this during the training. The adapter is removed with its checkpoint. Not for"
            " tuning.method: full, which has no adapter."
        ),
        example=True,
    )
    when_busy: Literal["wait", "skip"] = setting(
        "wait",
        about=(
            "What happens if a save is due while the previous one is still being uploaded. wait: the training waits."
            " skip: the save is skipped. The metrics record how long and how often."
        ),
        example="skip",
    )
    failed_saves: int = setting(
        3,
        about=(
            "Number of consecutive saves that may fail; if one more fails, the run ends with exit code 6. The first"
            " and the last save of a start must not fail."
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
            "Number of restarts after crashes before the run gives up. Capstan never restarts after a configuration"
            " or data error. A second crash at the same step ends the run."
        ),
        example=3,
        ge=0,
        unit="restarts",
    )
    preemptions: int | None = setting(
        None,
        about=(
            "Number of restarts after preempted or lost machines, counted separately from crashes. Default: no limit;"
            " in a Slurm job, cluster.spares."
        ),
        example=20,
        ge=0,
        unit="restarts",
    )
    skip_bad_window: bool = setting(
        True,
        about=(
            "If the loss is not finite, go back to the last commit and leave out that step's rows, once. With false,"
            " or the second time, the run ends with exit code 5."
        ),
        example=False,
    )
    slow_rank: Literal["name", "replace"] = setting(
        "name",
        about=(
            "What Capstan does if a rank is slower than the others for a while. name: the log, `capstan status` and"
            " the report name the rank and its machine. replace: in addition, the run starts again on other machines"
            " after its next commit; for `capstan submit slurm`, and for Ray clusters with more than one machine."
        ),
        example="replace",
    )


class Timeouts(Section):
    """Time limits. A rank that exceeds a limit counts as hanging: the log names it, and all ranks start again."""

    meet: Seconds = setting(
        900,
        about="Time limit until all ranks have come together, after torchrun or srun has started them.",
        example=300,
    )
    load: Seconds = setting(3600, about="Time limit for loading the model and restoring the checkpoint.", example=1800)
    step: Seconds = setting(
        900, about="Time limit for one step, for the data of one step, and for one evaluation.", example=300
    )
    save: Seconds = setting(3600, about="Time limit for waiting until a checkpoint is committed.", example=900)


class Track(Section):
    """Where the run's metrics are shown, in addition to the run's folder."""

    tensorboard: bool = setting(
        True, about="Write TensorBoard events into the run's folder, once a minute.", example=True
    )
    trackers: list[Annotated[str, OneOf("trainer.run.trackers", "SERVICES")]] = setting(
        [],
        about=(
            "Services that get the run's records; each needs an extra of the same name. Addresses and keys come from"
            " the environment. A service that fails never ends the run. See docs/tracking.md."
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
        None,
        about="The run's name in these services. Default: run.name.",
        example="8b, rank 16",
        min_length=1,
        max_length=100,
    )
    group: str | None = setting(
        None, about="Name of a group of runs in these services.", example="rank-ablation", min_length=1, max_length=100
    )
    tags: list[str] = setting([], about="The run's tags in these services.", example=["lora", "8b"])
    print_steps: Steps = setting(
        10,
        about=(
            "Print a line every N steps into rank 0's log; `capstan train` prints it too, if its output is not a"
            " terminal. 0 prints none."
        ),
        example=1,
    )
    price_per_gpu_hour: float | None = setting(
        None,
        about=(
            "The price of one GPU for an hour, in any currency. With it `capstan status` and `capstan report` show"
            " the cost of the run."
        ),
        example=2.5,
        ge=0,
        unit="money",
    )
    flush_seconds: Seconds = setting(
        5.0,
        about=(
            "How often new metrics and log lines are written to the store. A rank that prints a lot writes its log"
            " less often."
        ),
        example=10,
    )

    @model_validator(mode="after")
    def _shown_somewhere(self) -> "Track":
        for name in ("project", "name", "group", "tags"):
            if not self.trackers and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"track.{name}: has no effect without track.trackers. Name some there, or remove it.")
        return self
