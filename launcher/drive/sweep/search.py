"""The search as Ray Tune sees it: a searcher that says whose turn it is, and ASHA, whose verdict is a stop request.

Tune never ends a trial itself. Its schedulers would stop the trial's process, and count the trial as over while its
ranks still commit. Here the trial's run is asked to stop, as by `capstan stop`, and is over when it has ended.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from launcher.policy.trials import End, Turns
from trainer.config.sweep import Sweep
from trainer.errors import StorageError

STEP, VALUE = "step", "value"
"""The step of a result and the metric there; a trial's last result has neither."""
EXIT_CODE, REASON = "exit_code", "reason"
"""How a trial's run ended, in its last result."""
_LOOK_SECONDS = 1.0
_NO_END = 2**31
"""More steps than any run takes: the longest trials end by themselves."""


class Queue(Searcher):
    """Gives Tune its `turns`, until `closed()`. `sweep` is the URI of the sweep's folder."""

    def __init__(self, turns: Turns, sweep: str, closed: Callable[[], bool]) -> None:
        super().__init__()
        self._turns, self._sweep, self._closed = turns, sweep, closed
        self._numbers: dict[str, int] = {}
        self._looked = 0.0
        self.ends: dict[int, End] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._closed() or not self._turns.waiting:
            return Searcher.FINISHED
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return None  # Tune asks ten times a second, and each look may be a few requests
        number = None
        with suppress(StorageError):  # the next look may find the store again
            number = self._turns.next()
        if number is None:
            self._looked = time.monotonic()
            return None
        self._numbers[trial_id] = number
        return {"sweep": self._sweep, "trial": number}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self._numbers[trial_id]
        self._turns.ended(number)
        told = result or {}
        crash = End(1, "its process ended again and again, see Ray's own logs")
        self.ends[number] = crash if error else End(told.get(EXIT_CODE, 0), told.get(REASON, ""))

    def save(self, checkpoint_path: str) -> None:
        """Save nothing. A sweep goes on from its trials' folders, so Tune's own records of the search are not used."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # see `save`


class EarlyStopping(ASHAScheduler):
    """Asynchronous successive halving (arXiv:1810.05934), Tune's own.

    `stop` asks the trial with Tune's settings to end.
    """

    def __init__(self, sweep: Sweep, mode: str, stop: Callable[[Mapping[str, Any], int], None]) -> None:
        super().__init__(
            time_attr=STEP,
            metric=VALUE,
            mode=mode,
            max_t=_NO_END,
            grace_period=sweep.grace_steps or _NO_END,
            reduction_factor=sweep.reduction_factor,
            stop_last_trials=False,
        )
        self._ask, self._asked = stop, set[str]()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if trial.trial_id in self._asked:
            return TrialScheduler.CONTINUE
        if super().on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP:
            self._asked.add(trial.trial_id)
            self._ask(trial.config, result[STEP])
        return TrialScheduler.CONTINUE

    def __getstate__(self) -> dict[str, Any]:
        return {}  # see `Queue.save`


def next_look(sweep: Sweep, step: int) -> int | None:
    """Return the first step after `step` at which ASHA looks at a trial; None without early stopping."""
    if sweep.grace_steps is None:
        return None
    look = sweep.grace_steps
    while look <= step:
        look *= sweep.reduction_factor
    return look
