"""A toy action: the largest value of what learns, over all ranks, every so many steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.config.section import Section, Steps, part, setting
from trainer.train.every import Action, ActionKind, Actions, Moment

if TYPE_CHECKING:
    from trainer.train.loop import Training


class LargestSettings(Section):
    """How often it is looked for."""

    largest_every: Steps = setting(0, about="Look for the largest value of what learns; 0 turns it off.", example=50)


@dataclass
class Largest(Action):
    run: Training
    every: int

    def is_due(self, now: Moment) -> bool:
        return now.is_every(self.every) or now.last

    def act(self, now: Moment) -> dict[str, float]:
        mine = max(float(part.states["master"].abs().max()) for part in self.run.engine.partitions())
        return {"value": max(found for (found,) in self.run.start.ranks.gather(mine))}


def _open(run: Training, _: Actions) -> Largest | None:
    every = part(run.start.config.train, LargestSettings).largest_every
    return Largest(run, every) if every else None


SETTINGS = (LargestSettings,)
ACTIONS = {"largest": ActionKind(_open)}
