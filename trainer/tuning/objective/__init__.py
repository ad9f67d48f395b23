"""The interface of an objective, and the lookup of an objective by its name in `objective.name`.

An objective is one file or folder here. It may declare settings of its own (trainer/config/section.py). A loss over
pairs of answers is one file in pairs/.
`OBJECTIVES` maps each name that `objective.name` may have to a function that makes the objective from the section's
settings and the run's method. Importing the file must not load torch, because `plan` runs on a login node: code that
handles tensors imports torch when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from trainer.config.registry import chosen, kinds, refuse_unread, without_defaults
from trainer.tuning.method import Method, method_of

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.config import Config, ObjectiveSettings
    from trainer.model.micro_batch import MicroBatch
    from trainer.model.packed import PackedModel


@dataclass(frozen=True)
class Survey:
    """Figures over the whole global batch that the losses of a step need before the first of them is computed.

    `look` maps the model and a row to (sums + k,) fp32, without a graph and without dropout. The first `sums` values
    are sums of the row; the k values behind them are passed on to the loss of the same row. `look` passes `share` of a
    row's tokens through the model, and the loss passes the others. The step first calls `look` for all micro-batches.
    `MicroBatch.survey` then holds the result of its row, with the sums over the global batch in place of the row's. As
    with a loss, one call may call the model several times.
    """

    sums: int
    share: float
    look: Callable[[PackedModel, MicroBatch], Tensor]


OF_ROUTERS = ("router_loss", "router_loss_of")
"""The settings that stand beside every objective: what a base with experts adds to its loss."""


class Objective(Protocol):
    """A loss to minimise, with the settings of one run.

    A step minimises the sum of the loss divided by the sum of `weight`, both over all rows of the global batch. The
    defaults hold for most objectives; a class overrides some."""

    settings: Collection[str] = ()
    """The settings of the section `objective` that it reads. Others are refused, because they would be ignored."""
    defaults: Mapping[str, Any] = {"name": "sft"}
    """The value of a key that an identity lacks; see `trainer.tuning.method.Method.defaults`."""
    formats: Collection[str]
    """The kinds of rows that it can learn from; see `RowFormat.kind` in trainer/data/format/row_format.py."""
    reads_reference: bool = False
    """Whether the loss compares the model with the untrained base, by the values of `reference`.

    See trainer/plan/resolve.py.
    """
    survey: Survey | None = None
    """The survey that runs before the losses of a step, for an objective that needs one."""
    unit: str
    """The things that `weight` counts, as records name them: targets, pairs or answers."""
    measures: Sequence[str] = ()
    """Names of further figures. Records show their means over the global batch beside the loss."""

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that must equal a checkpoint's to resume from it, as JSON, without those equal to `defaults`."""
        ...

    def mismatches(self) -> list[str]:
        """One sentence for each setting that contradicts another one of the section."""
        return []

    def loss(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        """The sums of one packed row, fp32 on the model's device.

        Without `measures` this is (), the loss with its graph. With them it is (1 + measures,): the loss, then each
        measure, which has no graph. All calls of the model for the row happen inside one call of this function, because
        ZeRO-3 records the order of its gathers from the beginning of the call to its end."""
        ...

    def reference(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        """The reference's log-probabilities of a row's answers, (documents, answers) fp32, in nats.

        `model` computes as its base here. Documents are in the order of `batch.documents`. Where the values are stored,
        `loss` finds them in the column `reference`."""
        raise AssertionError("nobody asks for a reference that the loss does not read")

    def weight(self, batch: MicroBatch) -> int:
        """The weight of the row in the means; 0 for a row of padding. It is known without the model.

        Each pair or answer is one document.
        """
        return len(batch.documents) if self.unit in ("pairs", "answers") else batch.targets


class ObjectiveOfSettings(Objective):
    """An objective whose identity is the settings that its `defaults` name.

    It reads all of them unless its class lists fewer. If `given` has no beta, the one in `defaults` counts."""

    def __init__(self, given: ObjectiveSettings) -> None:
        self.settings = self.settings or tuple(self.defaults)
        self.beta: float = given.beta or self.defaults.get("beta", 0.0)
        self.given = given.model_copy(update={"beta": self.beta})

    @property
    def identity(self) -> dict[str, Any]:
        return without_defaults({name: getattr(self.given, name) for name in self.defaults}, self.defaults)


@runtime_checkable
class Summarised(Objective, Protocol):
    """An objective whose measures are not means. `loss` returns `sums` in their place, and `summary` the measures."""

    @property
    def sums(self) -> int: ...

    def summary(self, means: Sequence[float]) -> Sequence[float]:
        """Compute the measures from the sums over the global batch, each divided by the batch's weight."""
        ...


def sums_of(objective: Objective) -> int:
    """The number of sums that `loss` returns behind the loss of a row."""
    return objective.sums if isinstance(objective, Summarised) else len(objective.measures)


def measured(objective: Objective, means: Sequence[float]) -> dict[str, float]:
    """The measures by name, computed from the means of the sums."""
    figures = objective.summary(means) if isinstance(objective, Summarised) else means
    return dict(zip(objective.measures, figures, strict=True))


def objectives() -> dict[str, Callable[[ObjectiveSettings, Method], Objective]]:
    """Every objective of this folder, by the names that `objective.name` may have."""
    return kinds("trainer.tuning.objective", "OBJECTIVES")


def find_objective(config: Config, method: Method | None = None) -> Objective:
    """The objective that `objective.name` names, for the run's `method`. Looks the method up if it is not given.

    Raises:
        ConfigError: no objective has that name, or a setting has a value that the objective does not read.
    """
    method, given = method or method_of(config), config.objective
    objective = chosen(objectives(), "objective.name", given.name)(given, method)
    of_reference = ("reference",) if objective.reads_reference else ()
    refuse_unread(given, "objective.name", (*objective.settings, *of_reference, *OF_ROUTERS))
    return objective
