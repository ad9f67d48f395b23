"""The interface of an objective, and how one is found by its name in `objective.name`.

An objective is one file in this folder, or the `objective.py` of a folder here, whose `settings.py` may declare
settings of its own (trainer/config/section.py). A loss over pairs of answers is one file in pairs/losses. `OBJECTIVES`
maps each name that `objective.name` may have to a function that makes the objective from the section's settings and the
run's method. Importing the file loads no torch, as `plan` counts on a login node; code that handles tensors imports
torch when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from trainer.config import Config, ObjectiveSettings
from trainer.config.registry import chosen, kinds, refuse_unread, without_defaults
from trainer.tuning.method import Method, method_of

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.model.micro_batch import MicroBatch
    from trainer.model.packed import PackedModel


@dataclass(frozen=True)
class Survey:
    """Something to find over the whole global batch before the first loss of a step, which the losses depend on.

    `look` maps the model and a row to (sums + k,) fp32, without a graph and without dropout: `sums` sums of the row,
    and behind them any k figures that the loss of the same row wants to have again. It passes `share` of a row's tokens
    through the model, and leaves the others to the loss. All micro-batches of the step are looked at first;
    `MicroBatch.survey` is then what was found in its row, with the sums over the global batch in place of the row's. As
    with a loss, one call may call the model several times.
    """

    sums: int
    share: float
    look: Callable[[PackedModel, MicroBatch], Tensor]


class Objective(Protocol):
    """Something to minimise, with the settings of one run: the sum of the loss over the sum of `weight`, both over all
    rows of the global batch. A class of it says what is not so of most."""

    settings: Collection[str] = ()
    """The settings of the section `objective` that it reads. A value for any other is refused, as it would be
    ignored.
    """
    defaults: Mapping[str, Any] = {"name": "sft"}
    """The meaning of a key that an identity lacks; see `trainer.tuning.method.Method.defaults`."""
    formats: Collection[str]
    """The kinds of rows that it can learn from; see `RowFormat.kind` in trainer/data/format/row_format.py."""
    reads_reference: bool = False
    """Whether the loss compares with the base without what learns, by the values of `reference`; see
    trainer/plan/mismatches.py.
    """
    survey: Survey | None = None
    """The survey before the losses of a step, for an objective that needs one."""
    unit: str
    """The thing that `weight` counts, as records name it: targets, pairs or answers."""
    measures: Sequence[str] = ()
    """Names of further figures, which records show as means over the global batch beside the loss."""

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that a checkpoint must share to be continued, as JSON; values as in `defaults` are left out."""
        ...

    def mismatches(self) -> list[str]:
        """A sentence for each setting that contradicts another one of the section."""
        return []

    def loss(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        """The sums of one packed row, fp32 on the model's device: () the loss with its graph; with `measures`, (1 +
        measures,) the loss and then each of them, without a graph. It calls the model once or more, but always in one
        call of this
        function: ZeRO-3's trace of what is gathered begins and ends with it."""
        ...

    def reference(self, model: PackedModel, batch: MicroBatch) -> Tensor:
        """The log-probabilities by `model`, which is the base then, of the answers of each document of a row, in the
        order of `batch.documents`: (documents, answers) fp32, in nats. Where they are stored, `loss` finds them in
        the column `reference`."""
        raise AssertionError("nobody asks for a reference that the loss does not read")

    def weight(self, batch: MicroBatch) -> int:
        """How much the row counts in the means; 0 for a row of padding. Known without the model. Each pair or answer is
        a document.
        """
        return len(batch.documents) if self.unit in ("pairs", "answers") else batch.targets


class OfSettings(Objective):
    """An objective whose identity are its settings: those that its `defaults` name, which it reads unless it says
    fewer. A beta that is not `given` is that of its `defaults`."""

    def __init__(self, given: ObjectiveSettings) -> None:
        self.settings = self.settings or tuple(self.defaults)
        self.beta: float = given.beta or self.defaults.get("beta", 0.0)
        self.given = given.model_copy(update={"beta": self.beta})

    @property
    def identity(self) -> dict[str, Any]:
        return without_defaults({name: getattr(self.given, name) for name in self.defaults}, self.defaults)


@runtime_checkable
class Summarised(Objective, Protocol):
    """An objective whose measures are no means, but figures of so many `sums`, which `loss` returns in the place of the
    measures.
    """

    @property
    def sums(self) -> int: ...

    def summary(self, means: Sequence[float]) -> Sequence[float]:
        """The measures, by the sums over the global batch, each divided by its weight."""
        ...


def sums_of(objective: Objective) -> int:
    """The sums that the loss of a row is returned with."""
    return objective.sums if isinstance(objective, Summarised) else len(objective.measures)


def measured(objective: Objective, means: Sequence[float]) -> dict[str, float]:
    """The measures by name, of the means of these sums."""
    figures = objective.summary(means) if isinstance(objective, Summarised) else means
    return dict(zip(objective.measures, figures, strict=True))


def objectives() -> dict[str, Callable[[ObjectiveSettings, Method], Objective]]:
    """Every objective of this folder, by the names that `objective.name` may have."""
    return kinds("trainer.tuning.objective", "OBJECTIVES", speaks="objective")


def find_objective(config: Config, method: Method | None = None) -> Objective:
    """The objective that `objective.name` names, for the run's `method`, which is looked up unless it is known.

    Raises:
        ConfigError: there is none of that name, or a setting has a value that it does not read.
    """
    method, given = method or method_of(config), config.objective
    objective = chosen(objectives(), "objective.name", given.name)(given, method)
    of_reference = ("reference",) if objective.reads_reference else ()
    refuse_unread(given, "objective.name", (*objective.settings, *of_reference))
    return objective
