"""Keeps what learns after every update in memory that outlives the rank (`cluster.keeper`)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trainer.config.section import part
from trainer.train.every import Action, ActionKind, Actions, Moment, Stage
from trainer.train.every.look import LookSettings

if TYPE_CHECKING:
    from trainer.train.loop import Training


class Keep(Action):
    """Keeps every update. With `looks` it looks at what is kept before the next update, and keeps it again if a byte is
    wrong. Neighbours look at what they have when a new copy comes.
    """

    stage = Stage.KEEP

    def __init__(self, run: Training, looks: bool) -> None:
        assert run.checkpoints.memory is not None
        self._run, self._looks, self._memory = run, looks, run.checkpoints.memory
        self._kept: tuple[int, dict[str, int]] | None = None
        """The newest update that is kept, with its place in the data."""
        self._seconds = 0.0

    def told(self) -> tuple[float, ...]:
        began = time.perf_counter()
        # No rank ends the next update before the last one is where it is kept, so all ranks always have a common one.
        self._memory.arrived()
        wrong = False
        if self._looks and self._kept is not None:
            step, position = self._kept
            if wrong := not self._memory.is_sound(step):  # the state itself is still there
                self._run.checkpoints.keep(self._run.engine, step, position)
                self._memory.arrived()
        self._seconds += time.perf_counter() - began
        return float(wrong), float(self._memory.sent_again())

    def stepped(self, step: int) -> Mapping[str, float]:
        spent, self._seconds = self._seconds, 0.0
        return {"keep_seconds": round(spent, 6)}

    def heard(self, ranks: Sequence[Sequence[float]]) -> None:
        if not any(any(rank) for rank in ranks):
            return
        start, step = self._run.start, self._kept[0] if self._kept else 0
        machines = start.ranks.gather_objects(start.starter.machine)
        for rank, (told, machine) in enumerate(zip(ranks, machines, strict=True)):
            for where in [where for where, wrong in zip(("kept", "copied"), told, strict=True) if wrong]:
                facts = {"step": step + 1, "rank": rank, "machine": machine, "where": where, "since": step}
                start.metrics.write("wrong_bytes", **facts, tensor="what learns")

    def is_due(self, now: Moment) -> bool:
        return True

    def act(self, now: Moment) -> None:
        assert now.window is not None
        began = time.perf_counter()
        self._kept = now.step, now.window.end.to_json()
        self._run.checkpoints.keep(self._run.engine, *self._kept)
        self._seconds += time.perf_counter() - began


def _opens(run: Training, _: Actions) -> Keep | None:
    if run.checkpoints.memory is None:
        return None
    return Keep(run, looks=part(run.start.config.train, LookSettings).look_share > 0)


ACTIONS = {"keep": ActionKind(_opens)}
