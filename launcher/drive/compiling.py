"""A run's data, compiled by its driver: before the ranks start and, if the data is in chapters, also beside them."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from launcher.cluster.ray.data import map_on_cluster
from launcher.drive.signals import BY_COMPILATION
from launcher.start.attempts import stop_if_asked
from launcher.view.compiling import compile_progress, log_left_out
from trainer.base.find.locate import resolve_base
from trainer.config import Config
from trainer.data.compile.compile import Progress
from trainer.data.compile.pool import map_on_cores
from trainer.data.compile.prepare import Datasets, prepare_start
from trainer.data.dataset.chapters import give_up
from trainer.errors import CapstanError, Stopped, StorageError, Unreachable
from trainer.run.records import generations, record_end
from trainer.run.requests import request_stop
from trainer.store.store import Store, open_run_store

_LOOK_SECONDS = 2.0
_AGAIN_SECONDS = 10.0


class Compilation:
    """The data of `run`, whose folder has the stop requests. `log` gets the progress."""

    def __init__(self, config: Config, folder: Store, log: Callable[[str], None]) -> None:
        self._config, self._run, self._log = config, folder, log
        self._over = threading.Event()
        self._looked, self._told = 0.0, 0

    def begin(self, *, on_cluster: bool) -> tuple[Datasets, Iterator[int]]:
        """Return the data that the run starts with, and what compiles the rest of it.

        Both raise `Stopped` when a stop is requested.
        """
        stop_if_asked(self._run, "before it started")
        # The two functions below are called for the first chapter here and, when this is true, for the rest beside the
        # ranks.
        beside = False
        # The progress is in lines even on a terminal, because the run's live view is there already.
        with compile_progress(self._log, bar=False) as show:

            def progress(what: str, now: Progress) -> None:
                if not beside:
                    show(what, now)
                else:  # a line for each chapter is enough
                    log_left_out(self._log, what, now)
                self._look()

            def mapper(work: Iterable[Any], start: Callable[[], Any]) -> Iterator[Any]:
                # Beside the ranks, data is compiled on this machine alone: tasks would book the CPUs that the ranks are
                # about to take.
                if on_cluster and not beside:
                    return map_on_cluster(self._log, self._look, work, start)
                return map_on_cores(work, start)

            base, store = resolve_base(self._config.model), open_run_store(self._config)
            prepared = prepare_start(self._config, base, store, progress, mapper)
            beside = True
            return prepared

    def _look(self) -> None:
        if self._over.is_set():
            raise Stopped("the run has ended, and needs no more data.")
        if time.monotonic() - self._looked > _LOOK_SECONDS:
            self._looked = time.monotonic()
            stop_if_asked(self._run, "while its data was compiled")

    @contextmanager
    def beside(self, rest: Iterator[int]) -> Iterator[None]:
        """Compile the `rest` of the data while ranks work, and stop when they end.

        If it fails the ranks commit and end, whether they wait for data or have some left. Then the run ends with this
        failure.
        """
        failure: BaseException | None = None

        def work() -> None:
            nonlocal failure
            try:
                self._finish(rest)
            except BaseException as error:  # whatever the error is, ranks may be waiting for data that does not come
                if self._over.is_set():
                    return
                failure = None if isinstance(error, Stopped) else error
                self._give_up(error)

        thread = threading.Thread(target=work, name="compile", daemon=True)
        thread.start()
        try:
            yield
        except CapstanError:
            if failure is None:
                raise
            if generations(self._run):  # these ranks know only that they were to stop
                record_end(self._run, str(failure), crash=True)
            raise failure from None
        finally:
            self._over.set()
            thread.join(timeout=_LOOK_SECONDS)  # it looks at every batch of rows

    def _finish(self, rest: Iterator[int]) -> None:
        while True:
            try:
                for chapter in rest:
                    if chapter >= self._told:
                        self._log(f"chapter {chapter + 1} of the training data is compiled")
                        self._told = chapter + 1
                return
            except Unreachable as error:  # the ranks are patient with a store, too
                self._log(f"compiling goes on when the store can be reached: {error}")
                rest = self._again()

    def _again(self) -> Iterator[int]:
        while not self._over.wait(_AGAIN_SECONDS):
            with suppress(Unreachable):
                return self.begin(on_cluster=False)[1]
        raise Stopped("the run has ended, and needs no more data.")

    def _give_up(self, error: BaseException) -> None:
        """Record the failure in the run's folder, however long the store cannot be reached."""
        while not self._over.is_set():
            with suppress(StorageError):
                give_up(self._run, error)
                if not isinstance(error, Stopped):
                    request_stop(self._run, by=BY_COMPILATION)
                return
            self._over.wait(_LOOK_SECONDS)
