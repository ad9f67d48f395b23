"""The whole tree of settings, and a walk over it."""

from collections.abc import Iterator
from typing import Any, Literal, get_args

from pydantic import BaseModel, model_validator
from pydantic.fields import FieldInfo

from trainer.config.cluster import Cluster
from trainer.config.data import Data
from trainer.config.evaluation import UNNAMED, Evaluation
from trainer.config.model import Model, Quant, Tuning
from trainer.config.objective import ObjectiveSettings, RolloutSettings
from trainer.config.registry import kinds
from trainer.config.run import Checkpoint, Retry, Run, Timeouts, Track
from trainer.config.section import Section
from trainer.config.sweep import Sweep
from trainer.config.training import Optim, Sharding, Train


class Config(Section):
    """A whole run."""

    run: Run
    model: Model
    quant: Quant = Quant()
    tuning: Tuning = Tuning()
    objective: ObjectiveSettings = ObjectiveSettings()
    rollout: RolloutSettings = RolloutSettings()
    data: Data
    optim: Optim = Optim()
    train: Train
    eval: Evaluation = Evaluation()
    sharding: Sharding = Sharding()
    checkpoint: Checkpoint = Checkpoint()
    cluster: Cluster = Cluster()
    retry: Retry = Retry()
    timeouts: Timeouts = Timeouts()
    track: Track = Track()
    sweep: Sweep = Sweep()

    @model_validator(mode="after")
    def _used(self) -> "Config":
        if self.eval.between and not self.evaluated:
            name = "eval.every" if self.eval.every else "eval.per_epoch"
            raise ValueError(
                f"{name}: has no effect without data.eval, data.held_out or eval.sets. Set one of them, or set it to 0."
            )
        if wrong := self.eval.mismatches(self.data):
            raise ValueError(wrong[0])
        if wrong := [
            sentence for kind in kinds("trainer.train.every", "ACTIONS").values() for sentence in kind.mismatches(self)
        ]:
            raise ValueError(wrong[0])
        if wrong := self._uneven_workers():
            raise ValueError(wrong)
        if self.tuning.targets == []:
            raise ValueError("tuning.targets: [] leaves nothing to learn. Name layers, or set all-linear.")
        if self.train.products == "fp8" and (not self.quant.held.packs or self.model.dtype != "bf16"):
            name, given = (
                ("model.dtype", self.model.dtype) if self.quant.held.packs else ("quant.type", self.quant.type)
            )
            raise ValueError(
                f"train.products: fp8 needs frozen weights in 4 or 8 bits and model.dtype bf16, but {name} is {given}."
                " Set plain."
            )
        if self.checkpoint.keep_best and not self.eval.between:
            raise ValueError(
                "checkpoint.keep_best: has no effect without eval.every or eval.per_epoch. Set one of them, or set it"
                " to 0."
            )
        if self.train.stop_when.no_better and not self.checkpoint.keep_best:
            raise ValueError(
                "train.stop_when.no_better: the best checkpoint would not be kept. Set checkpoint.keep_best: 1, and"
                " eval.every or eval.per_epoch."
            )
        if self.sweep.settings:
            known = [name for name, _ in fields()]
            every = (
                1 if self.eval.per_epoch else self.eval.every
            )  # how many steps a part of an epoch is, is not known yet
            if wrong := self.sweep.mismatches(known, self.evaluated, every):
                raise ValueError("\n".join(wrong))
        return self

    def _uneven_workers(self) -> str | None:
        workers, size = self.cluster.workers, self.sharding.sequence_parallel
        if size > 1 and isinstance(workers, tuple):
            return (
                f"cluster.workers: {list(workers)} lets the number of ranks change, which sharding.sequence_parallel:"
                f" {size} does not allow, as the ranks are a multiple of it. Give one number."
            )
        if isinstance(workers, int) and workers % size:
            return (
                f"cluster.workers: {workers} is no multiple of sharding.sequence_parallel: {size}. Change one of them."
            )
        return None

    def decided(self, in_4_bits: bool) -> "Config":
        """Return the settings with `quant.type: stored` if `quant` is not set and the base is published `in_4_bits`:
        quantizing it again would lose something."""
        if self.quant.model_fields_set or not in_4_bits:
            return self
        return self.model_copy(update={"quant": Quant(type="stored")})

    @property
    def leaves_type_open(self) -> bool:
        """Whether the machine decides `model.dtype`: it is not set, and no other setting needs bf16."""
        return "dtype" not in self.model.model_fields_set and self.train.products != "fp8"

    def computing_in(self, dtype: Literal["bf16", "fp32"]) -> "Config":
        """Return the settings with this `model.dtype`, as if it had been set."""
        return self.model_copy(update={"model": self.model.model_copy(update={"dtype": dtype})})

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Names of the sets that the run evaluates."""
        return (*((UNNAMED,) if self.data.eval or self.data.held_out else ()), *self.eval.sets)


def fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting, depth first, as (dotted name, field)."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from fields(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field of this type holds, in lists and options too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from sections_in(argument)
