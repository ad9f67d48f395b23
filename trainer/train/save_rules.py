"""When a checkpoint is due: after so many steps, or so many minutes after the one before."""

import time
from collections.abc import Callable

from trainer.config.run import Checkpoint


class SaveRules:
    """The rules of a run's saves, and the time since the last one by `clock`, in seconds. One start has one."""

    def __init__(self, rules: Checkpoint, clock: Callable[[], float] = time.monotonic) -> None:
        self._rules, self._clock = rules, clock
        self._saved = clock()

    @property
    def since_save(self) -> float:
        """Seconds since the last save, or since the start began to train."""
        return self._clock() - self._saved

    def is_due(self, step: int, since_save: float) -> bool:
        """Whether the state at `step` is saved by its number or the time. `since_save` is rank 0's: the clocks of the
        ranks differ, and all must save at once."""
        every, minutes = self._rules.every_steps, self._rules.every_minutes
        return (every > 0 and step % every == 0) or (minutes > 0 and since_save >= 60 * minutes)

    def saved(self) -> None:
        self._saved = self._clock()
