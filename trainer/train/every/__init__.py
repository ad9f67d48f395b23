"""The protocol of what a run does every so many steps beside its updates. Each kind is a file of this folder.

    begins                    the state that a start goes on from; before the first step of a run, MEASURE acts as well
    told, heard               numbers of each rank that travel with the exchange of every update
    stepped                   figures for the record of every step
    is_due, act   MEASURE     evaluate, sample: before it is decided whether the run ends with this state
                  KEEP        save
                  REPORT      routing: what came since the save before
    close                     however the start ends

A file names its kinds in `ACTIONS`, and settings of its own, which become settings of the section `train`, in
`SETTINGS`. The configuration reads both, so the file imports torch, and of ours all but trainer.config.section and this
one, where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.config import Config
    from trainer.data.order.settings import Position
    from trainer.model.micro_batch import MicroBatch
    from trainer.train.loop import Training


class Stage(IntEnum):
    """The turns of the actions after an update. Within a stage they act in the order of their names."""

    MEASURE = 0
    KEEP = 1
    REPORT = 2


class DataWindow(NamedTuple):
    """The data between two updates."""

    begin: Position
    end: Position


@dataclass
class Moment:
    """The state after `step` updates, in which an action may be due. All but `rows` is the same on every rank.

    Attributes:
        window: the data since the update before; None before the first step of the run.
        rows: this rank's rows of the update; none before the first step.
        figures: the loss, the learning rate and the norm of the gradient of the update; empty before the first step.
        first: the update is the first of this start.
        last: the start ends with this state. Until KEEP only the end that the settings give is known.
        stopping: somebody asked the run to stop.
        evaluated: the loss by which the best checkpoint is kept, if it was measured in this state.
        saved: the state was given to the checkpoints.
    """

    step: int
    window: DataWindow | None = None
    rows: Sequence[MicroBatch] = ()
    figures: Mapping[str, float] = field(default_factory=dict)
    first: bool = False
    last: bool = False
    stopping: bool = False
    evaluated: float | None = None
    saved: bool = False

    def is_every(self, steps: int) -> bool:
        """Whether this state comes every so many steps, counting the state before the first step; 0 means never."""
        return steps > 0 and self.step % steps == 0


class Action:
    """Something that a run does every so many steps. A class says what it does, and inherits to do nothing else.

    Every rank calls all of it at the same time, so that each may exchange values with the others.
    """

    stage = Stage.MEASURE

    def begins(self, step: int) -> None:
        """The start goes on from the state after `step` updates."""

    def told(self) -> tuple[float | Tensor, ...]:
        """Numbers that all ranks get with the exchange of the current update, always equally many. One that the device
        still computes is a tensor ()."""
        return ()

    def heard(self, ranks: Sequence[Sequence[float]]) -> None:
        """The numbers that were `told`, by rank."""

    def stepped(self, step: int) -> Mapping[str, float]:
        """The update that makes `step` is done. Returns figures for its record."""
        return {}

    def evaluated(self, step: int, of: str) -> Mapping[str, float]:
        """An evaluation has passed over the data called `of`. Returns figures for its record."""
        return {}

    def is_due(self, now: Moment) -> bool:
        """Whether the action acts in this state."""
        return False

    def act(self, now: Moment) -> Mapping[str, float] | None:
        """Act in this state. Figures that it returns are a record, which all trackers, `capstan status` and `capstan
        report` show by the action's name."""

    def close(self) -> None:
        """The start is over."""


def never(_config: Config) -> Iterator[str]:
    """No mismatches."""
    return iter(())


class ActionKind(NamedTuple):
    """A kind of action. `opens` makes the action of a training, or None if its settings ask for nothing. `mismatches`
    yields a sentence for each of its settings that would have no effect.
    """

    opens: Callable[[Training, Actions], Action | None]
    mismatches: Callable[[Config], Iterator[str]] = never


class Actions:
    """The actions of a training, in their order. Collective, as each of them may be."""

    def __init__(self, run: Training) -> None:
        from trainer.config.registry import kinds  # not above: the configuration reads the actions while it is imported

        self._run = run
        self._every: dict[str, Action] = {}
        known: dict[str, ActionKind] = kinds("trainer.train.every", "ACTIONS")
        opened = {name: action for name, kind in known.items() if (action := kind.opens(run, self))}
        assert not opened.keys() & {"train", "eval"}, "the curves of steps and of evaluations have these names"
        self._every |= dict(sorted(opened.items(), key=lambda item: (item[1].stage, item[0])))
        self._counts = dict[str, int]()

    def begins(self, step: int) -> None:
        """The start goes on from the state after `step` updates; before the first one that is measured, too."""
        for action in self._every.values():
            action.begins(step)
        if step == 0:
            self.act(Moment(step), Stage.MEASURE)

    def told(self) -> list[float | Tensor]:
        """The numbers of all actions."""
        told = {name: action.told() for name, action in self._every.items()}
        self._counts = {name: len(numbers) for name, numbers in told.items()}
        return [number for numbers in told.values() for number in numbers]

    def heard(self, ranks: Sequence[Sequence[float]]) -> None:
        """Take in what each rank has `told`, by rank."""
        begin = 0
        for name, action in self._every.items():
            end = begin + self._counts[name]
            action.heard([row[begin:end] for row in ranks])
            begin = end

    def stepped(self, step: int) -> dict[str, float]:
        """The update that makes `step` is done: the figures of all for its record."""
        return {name: value for action in self._every.values() for name, value in action.stepped(step).items()}

    def evaluated(self, step: int, of: str) -> dict[str, float]:
        """An evaluation has passed over the data called `of`: the figures of all for its record."""
        return {name: value for action in self._every.values() for name, value in action.evaluated(step, of).items()}

    def act(self, now: Moment, *stages: Stage) -> None:
        """Let the due actions of these stages act."""
        for name, action in self._every.items():
            if action.stage in stages and action.is_due(now) and (figures := action.act(now)) is not None:
                self._run.start.metrics.write("measured", by=name, step=now.step, **figures)

    def close(self) -> None:
        for action in self._every.values():
            action.close()
