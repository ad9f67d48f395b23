"""A run over all attempts at it: each starts the ranks, and `retry.decide` says whether another follows.

The caller decides where ranks run. The ranks restore by themselves, so an attempt needs to know nothing of the one
before.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from launcher.policy import retry
from trainer.config import Config, dump_config
from trainer.data.compile.prepare import Datasets
from trainer.errors import CapstanError, ConfigError, NothingCommitted, Stopped, StorageError, Superseded
from trainer.run import layout
from trainer.run.background import say
from trainer.run.folder import command
from trainer.run.owner import Ownership, ended_waiting
from trainer.run.records import generations, newest_records, record_end, record_restart
from trainer.run.requests import read_stop
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.store import Store


def stop_if_asked(folder: Store, when: str) -> None:
    """Raise `Stopped` when somebody has asked the run to stop.

    If there is nothing to resume then, raise `NothingCommitted`.
    """
    if asked := read_stop(folder):
        if committed_steps(folder):
            raise Stopped(
                f"stopped {asked.reason} {when}; what was committed before stays. {command('resume', folder)} goes on."
            )
        raise NothingCommitted(
            f"stopped {asked.reason} {when}, and nothing is committed. Start it again from its configuration."
        )


def give_up_waiting(folder: Store) -> None:
    """Free a submitted run whose turn has not come: nobody else is there to say that it has ended."""
    if ended_waiting(folder):
        record_end(folder, "stopped before its job had begun", stopped=True)


_LOOK_SECONDS = 2.0


@dataclass
class Attempts:
    """A run and all attempts at it so far.

    `ends` are the attempts' ends. `began` is when the newest attempt was begun, in seconds since 1970. `before` is the
    newest generation before the current attempt. `committed`: the run has a checkpoint. `before` and `committed` are
    what the store said last. `kept`: the ranks' memory outlives them.
    """

    config: Config
    datasets: Datasets
    owner: Ownership
    resume: bool
    began: float = field(default_factory=time.time)
    ends: list[retry.Failure] = field(default_factory=list)
    before: int = 0
    committed: bool = False
    kept: bool = False

    @property
    def run(self) -> Store:
        return self.owner.run

    def keep_slow_machines(self) -> None:
        """Name slow ranks from now on, and no longer ask for other machines."""
        rules = self.config.retry.model_copy(update={"slow_rank": "name"})
        self.config = self.config.model_copy(update={"retry": rules})

    def task(self) -> dict[str, Any]:
        """The task that each rank of the newest attempt is given, in values that JSON has."""
        datasets = asdict(self.datasets)
        return {"config": dump_config(self.config), "datasets": datasets, "resume": self.resume, "began": self.began}


def keep_trying(attempts: Attempts, attempt: Callable[[], retry.Failure | None], log: Callable[[str], None]) -> None:
    """Make attempts until one is done or the budgets are used up.

    `attempt` returns why it ended, or None when the run is done.

    Raises:
        CapstanError: the run's own, or a crash's with its reason.
    """
    run = attempts.run
    while True:
        try:
            attempts.owner.check()
            attempts.before = max(generations(run), default=0)
            # Both keys belong to the attempt before: its request to begin again, and its sign that the ranks had begun.
            run.delete(layout.RESTART)
            run.delete(layout.RANKS_BEGUN)
            end = attempt()
        except Superseded:
            raise
        except StorageError as error:
            end = retry.Failure(str(error), error)
        except (ConfigError, Stopped) as error:
            if attempts.ends:
                raise _between_attempts(attempts, error) from None
            raise
        if end is None:
            return
        log(_after(attempts, end))
        attempts.began = time.time()


def _after(attempts: Attempts, end: retry.Failure) -> str:
    """Record why an attempt ended.

    Return the sentence with which another follows, or raise the error that ends the run.

    A store that does not answer prevents neither.
    """
    run, before = attempts.run, attempts.before
    try:
        attempts.owner.check()  # the newest records would be another start's
        end = retry.explained(end, newest_records(run, after=before))
        stopped, crash = isinstance(end.error, Stopped), end.error is None
        record_end(run, end.reason, stopped=stopped, crash=crash, after=before, **end.facts)
        attempts.committed = bool(committed_steps(run))
    except Superseded:
        raise
    except StorageError as error:
        say(f"why this start ended could not be kept, which does not end the run: {error}")
    attempts.ends.append(end)
    rules, tell = attempts.config.retry, partial(command, folder=run)
    place = "the last update that is kept" if attempts.kept else "the last commit"
    decision = retry.decide(attempts.ends, rules, committed=attempts.committed, command=tell, place=place)
    if isinstance(decision, CapstanError):
        raise decision
    with suppress(StorageError):
        record_restart(run, decision)
    return decision


def _between_attempts(attempts: Attempts, error: ConfigError | Stopped) -> CapstanError:
    """Return the error that ends a run which has trained before.

    It is recorded as the end of the start that comes to nothing.
    """
    if isinstance(error, ConfigError) and attempts.committed:
        resume = command("resume", attempts.run)
        error = Stopped(f"{attempts.ends[-1].reason}; since then: {error} {resume} goes on.")
    with suppress(StorageError):
        record_end(attempts.run, str(error), stopped=isinstance(error, Stopped), after=attempts.before)
    return error


class Watch:
    """The driver's checks while ranks work: a stop that need not wait for a step, and whatever `more` checks.

    `more` is told whether the ranks train already.
    """

    def __init__(self, attempts: Attempts, more: Callable[[bool], None] = lambda training: None) -> None:
        self._attempts, self._more = attempts, more
        self._training = self._failing = False
        self._looked = time.monotonic()

    def look(self) -> None:
        """Raise `Stopped` when a stop was asked for, nothing new is trained and something is committed already.

        This also raises what `more` raises. A store that does not answer is asked again at the next look.
        """
        try:
            self._look()
        except StorageError as error:
            if not self._failing:
                say(f"looking after the ranks failed, which does not end the run, and will be tried again: {error}")
            self._failing = True
        else:
            self._failing = False

    def _look(self) -> None:
        now, run = time.monotonic(), self._attempts.run
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        if not self._training:
            records = newest_records(run, after=self._attempts.before)
            self._training = any(record["kind"] == "start" for record in records)
            if not self._training and committed_steps(run):
                stop_if_asked(run, "while the run was starting")
        self._more(self._training)
