"""What learns, after every update, in memory that outlives the rank (`cluster.keeper`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.train.every.every import Action, ActionKind, Actions, Moment, Stage

if TYPE_CHECKING:
    from trainer.train.loop import Training


class Keep(Action):
    stage = Stage.KEEP

    def __init__(self, run: Training) -> None:
        self._run = run

    def told(self) -> tuple[float, ...]:
        # No rank ends the next update before the last one is where it is kept, so all ranks always have a common one.
        assert self._run.checkpoints.memory is not None
        self._run.checkpoints.memory.arrived()
        return ()

    def is_due(self, now: Moment) -> bool:
        return True

    def act(self, now: Moment) -> None:
        assert now.window is not None
        self._run.checkpoints.keep(self._run.engine, now.step, now.window.end.to_json())


def _opens(run: Training, _: Actions) -> Keep | None:
    return Keep(run) if run.checkpoints.memory is not None else None


ACTIONS = {"keep": ActionKind(_opens)}
