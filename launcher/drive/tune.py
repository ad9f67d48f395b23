"""The parts that Ray Tune is given: a searcher that says whose turn it is, ASHA, whose verdict is a stop request, and
the trial.

Tune never ends a trial itself. Its schedulers would stop the trial's process, and count the trial as over while its
ranks still commit. Here the trial's run is asked to stop, as by `capstan stop`, and is over when it has ended.

A trial is an ordinary run, driven on the cluster by a process of Tune's. That process holds no GPU, because the run's
ranks have their own.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

from ray.tune import Trainable
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from launcher.drive.driver import Journal, compile_and_train, forget_own_stop
from launcher.policy.trials import End, Turns, trial_config
from launcher.report.report import keep_report
from launcher.start.claim import claimed
from launcher.view.status import read_status
from launcher.view.sweep import BY, DONE, EARLY, Scores, read_plan, trial_state
from trainer.base.base import Base
from trainer.base.find.check import hub_commit
from trainer.base.find.locate import resolve_base
from trainer.config import Config, dump_config
from trainer.config.sweep import Sweep
from trainer.errors import CapstanError, ConfigError, Stopped, StorageError, Superseded
from trainer.run import layout
from trainer.run.background import say
from trainer.run.folder import run_config, run_folder
from trainer.run.owner import read_owner
from trainer.run.records import generations, record_end
from trainer.run.requests import read_stop, request_stop
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.store import Store, open_store

STEP, VALUE = "step", "value"
"""The step of a result and the metric there; a trial's last result has neither."""
EXIT_CODE, REASON = "exit_code", "reason"
"""How a trial's run ended, in its last result."""
_TURN_SECONDS = 1.0
_NO_END = 2**31
"""More steps than any run takes: the longest trials end by themselves."""
_LOOK_SECONDS = 0.5
_WORST = 1e30
"""A figure that was no finite number is worse than any other. ASHA takes means of neighbours, so it is none that they
overflow by.
"""


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
        if time.monotonic() - self._looked < _TURN_SECONDS:
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


def base_facts(base: Base) -> dict[str, str]:
    """Return the facts by which `base` is recognized again. Reads samples of its weights."""
    digest = hashlib.sha256(json.dumps([base.fingerprint, base.samples]).encode()).hexdigest()[:16]
    commit = hub_commit(base.directory)
    return {"digest": digest, **({"commit": commit} if commit else {})}


def check_same(config: Config, known: dict[str, str]) -> None:
    """Raise `ConfigError` if the base of a trial's `config` is another than the `known` one.

    Without facts nothing is read.
    """
    if known and base_facts(resolve_base(config.model)) != known:
        raise ConfigError(
            f"model.base: {config.model.base} is not the model that this sweep began with: its weights have changed"
            " since. Put that one back, or start another sweep under another run.name."
        )


class TuneTrial(Trainable):
    """Trains the run of a trial, or continues it. Each result is the metric at the steps where ASHA looks.

    If the run is done already, only its figures are reported again.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Set the trial up. `config` has the folder of the sweep as `sweep`, and the trial's number as `trial`.

        The run begins at the first `step`: Tune may set a process up for a trial, and then give the trial to one that
        has become free.
        """
        folder = open_store(config["sweep"])
        plan, whole = read_plan(folder), run_config(folder)
        trial = plan.trials[config["trial"] - 1]
        self._mine, self._base = plan.config_of(whole, trial), plan.base_of(trial_config(whole, trial))
        self._sweep, self._looked = whole.sweep, 0
        self._scores = Scores(run_folder(self._mine), plan.metric)
        self._worst = _WORST if plan.metric.mode == "min" else -_WORST
        self._work: Future[None] | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take over from a trial that has ended, which saves a new process and its imports."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        work = self._work = self._work or ThreadPoolExecutor(1, "driver").submit(train_trial, self._mine, self._base)
        while True:
            over = bool(wait([work], timeout=_LOOK_SECONDS).done)
            if (look := next_look(self._sweep, self._looked)) is not None:
                with suppress(StorageError):
                    for step, value in self._scores.read().items():
                        if step >= look:
                            self._looked = step
                            return {STEP: step, VALUE: value if math.isfinite(value) else self._worst}
            if over:
                return {"done": True, **_end(work)}


def _end(work: "Future[None]") -> dict[str, Any]:
    """Return how the run ended. Our own mistakes are raised."""
    try:
        work.result()
    except CapstanError as error:
        return {EXIT_CODE: error.exit_code, REASON: str(error)}
    return {}


def train_trial(config: Config, base: dict[str, str]) -> None:
    """Train the run of `config` to its end on the cluster that this process is in.

    It continues from its newest commit, if it has one. `base` has the facts about the base that the sweep began with.

    Raises:
        CapstanError: the run's own, which is in its folder too.
    """
    run = run_folder(config)
    if trial_state(run, read_status(run)) in DONE:
        return
    resume, before, known = bool(committed_steps(run)), read_owner(run), max(generations(run), default=0)
    # The process that had the run for this sweep is gone, with its driver or with its machine.
    ours = before is not None and before.by == BY
    taken, asked = False, None
    try:
        with claimed(config, by=BY, resume=resume, code=None, log=say, take_over=ours) as owner:
            taken = True
            journal = Journal(run, say)
            try:
                with journal.to_the_end():
                    check_same(config, base)
                    compile_and_train(config, owner, journal, resume=resume, dashboard="", log=say)
            except CapstanError:
                asked = read_stop(run)
                raise
            finally:
                if not owner.lost:
                    forget_own_stop(run)
                    keep_report(run, say)
    except CapstanError as error:
        if taken and not isinstance(error, Superseded):  # otherwise its records are another start's
            # A start without ranks puts back the request before it. Ranks that are about to end may still read this
            # request, so it has its reason.
            if asked and asked.by == EARLY and asked != read_stop(run):
                request_stop(run, *asked)
            _record(run, config, error, known)
        raise


def _record(folder: Store, config: Config, error: CapstanError, known: int) -> None:
    """Record the end, even of a run that came to nothing. Nobody sees what this process prints."""
    if not folder.exists(layout.CONFIG):
        folder.put(layout.CONFIG, dump_config(config).encode())
    record_end(folder, str(error), stopped=isinstance(error, Stopped), after=known)
