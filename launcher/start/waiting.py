"""Ranks that start before the run's data is there: they wait as long as rank 0, which compiles it, lives."""

import time
from collections.abc import Callable

from trainer.base.find.locate import resolve_base
from trainer.config import Config
from trainer.data.compile.prepare import wait_until_prepared
from trainer.errors import DataError
from trainer.processes.siblings import Siblings
from trainer.run.folder import run_folder
from trainer.run.owner import OwnerWatch
from trainer.store.store import open_run_store

_LOOK_SECONDS = 2.0


def wait_for_first_rank(config: Config, group: str | None, sleep: Callable[[float], None] = time.sleep) -> None:
    """Return once the run's data is compiled; meanwhile rank 0, of `group` where that is known, has the run.

    Raises:
        DataError: it had the run and has ended, or has not had it for `timeouts.meet` seconds.
    """
    watch, siblings = OwnerWatch(run_folder(config), group), Siblings()

    def wait() -> None:
        if watch.is_gone() or (watch.is_unheard and siblings.is_gone(0)):
            raise DataError(
                "rank 0, which compiles the data, has ended, so this rank ends too. Its own output says why; start all"
                " ranks again."
            )
        if time.monotonic() - watch.last_alive > config.timeouts.meet:
            raise DataError(
                f"timeouts.meet: rank 0, which compiles the data, has not been heard of for {config.timeouts.meet:g} s,"
                " so this rank ends. Its own output says why it did not start."
            )
        sleep(_LOOK_SECONDS)

    wait_until_prepared(config, resolve_base(config.model), open_run_store(config), wait)
