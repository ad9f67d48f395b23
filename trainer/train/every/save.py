"""Checkpoints: after so many steps, so many minutes after the previous one, so many times a pass, and at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.train.every import Action, ActionKind, Actions, Moment, Stage

if TYPE_CHECKING:
    from trainer.train.loop import Training


class Save(Action):
    """Saves by the rules of `checkpoint`. Rank 0's clock decides: the clocks of the ranks differ, and all must save at
    once.
    """

    stage = Stage.KEEP

    def __init__(self, run: Training, _: Actions) -> None:
        self._run, self._rules = run, run.start.config.checkpoint
        self._saved, self._since = run.clock(), 0.0

    def told(self) -> tuple[float, ...]:
        """Whether this rank's background work on the last save is done, and the seconds since the last save, or since
        the start began to train."""
        return float(self._run.checkpoints.ready), self._run.clock() - self._saved

    def heard(self, ranks: Sequence[Sequence[float]]) -> None:
        self._since = ranks[0][1]
        self._run.checkpoints.advance(all_ready=all(ready for ready, _ in ranks))

    def is_due(self, now: Moment) -> bool:
        rules = self._rules
        assert now.window is not None
        best = rules.keep_best and now.evaluated is not None
        late = rules.every_minutes > 0 and self._since >= 60 * rules.every_minutes
        due = now.is_every(rules.every_steps) or late or self._run.horizon.is_due(rules.per_epoch, *now.window)
        return bool(now.first or now.last or best or due)

    def act(self, now: Moment) -> None:
        checkpoints = self._run.checkpoints
        assert now.window is not None
        position = now.window.end.to_json()
        checkpoints.save(self._run.engine, now.step, position, eval_loss=now.evaluated, may_skip=not now.last)
        now.saved = True
        self._saved = self._run.clock()
        if now.first:
            checkpoints.prove()
        if now.last:
            checkpoints.finish()


ACTIONS = {"save": ActionKind(Save)}
