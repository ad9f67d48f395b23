"""The process that owns a run: it has the data compiled, keeps the ranks alive on Ray or on this machine, and ends with
the run's exit code.

    python -m launcher.drive.driver RUN_URI --submission ID [--resume] [--address HOST:PORT] [--fixed]

drives a run whose folder `capstan submit` has made: the entrypoint of a Ray job, or of a batch script on its own Ray.
`capstan train` and `capstan resume` do the same in the foreground. docs/architecture.md has the files that a submission
and a failure pass, in their order.

The data is compiled before the ranks start and, if it is in chapters, also beside them. A signal is no failure, nor is
`capstan stop`: it becomes the key STOP in the run's folder, which the ranks obey at their next step, and the driver
before it has ranks (start/attempts.py). A failure to compile the rest of the data asks for a stop in the same way. The
driver's work runs in a thread, which leaves the main thread free for signals.
"""

import argparse
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

from launcher.cluster.ray.cluster import address_of, joined_ray
from launcher.cluster.ray.data import map_on_cluster
from launcher.cluster.ray.train import run_on_ray
from launcher.report.report import keep_report
from launcher.start.attempts import Attempts, stop_if_asked
from launcher.start.claim import turn
from launcher.start.local_ranks import ranks_here, run_here
from launcher.start.sidecars import sidecars_here
from launcher.view.compiling import compile_progress, log_left_out
from launcher.view.watch import follow_lines, watch
from trainer.base.find.locate import resolve_base
from trainer.config import Config
from trainer.data.compile.compile import Progress
from trainer.data.compile.pool import map_on_cores
from trainer.data.compile.prepare import Datasets, prepare_start
from trainer.data.dataset.chapters import forget_given_up, give_up
from trainer.errors import CapstanError, NotFound, Stopped, StorageError, Superseded, Unreachable
from trainer.processes.helper_thread import helper_thread, in_thread
from trainer.run import layout
from trainer.run.background import Harmless, say
from trainer.run.folder import submitted_config
from trainer.run.owner import Ownership
from trainer.run.records import generations, record_end
from trainer.run.requests import request_stop, stop_requester
from trainer.store.store import Store, open_run_store, open_store

_LOOK_SECONDS = 2.0
_AGAIN_SECONDS = 10.0
ENDED_AT_ONCE = 130
"""The exit code after a second Ctrl-C."""
BY_COMPILATION = "the compilation of its data"
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Journal:
    """Lines for `capstan logs RUN --driver`. `log` shows those that a person should see at once."""

    def __init__(self, folder: Store, log: Callable[[str], None]) -> None:
        self._run, self._log = folder, log
        self._harmless = Harmless("keeping the driver's log")
        self._text, self._keeping = "", threading.Lock()
        with suppress(NotFound):
            self._text = folder.get(layout.DRIVER_LOG).decode(errors="replace")
        self.keep(f"driver of process {os.getpid()} on {socket.gethostname()}")

    def write(self, line: str) -> None:
        self._log(line)
        self.keep(line)

    @contextmanager
    def to_the_end(self) -> Iterator[None]:
        """Record how the body, which is the driver's work, ends."""
        try:
            yield
        except CapstanError as error:
            self.keep(f"ended with exit code {error.exit_code}: {error}")
            raise
        self.keep("finished")

    def keep(self, line: str) -> None:
        with self._keeping:  # work beside the ranks has threads of its own
            self._text += f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n"
            self._harmless(lambda: self._run.put(layout.DRIVER_LOG, self._text.encode()))


def drive(
    config: Config,
    owner: Ownership,
    *,
    resume: bool,
    live: bool,
    log: Callable[[str], None],
    address: str | None = None,
    can_grow: bool = True,
) -> None:
    """Compile what is missing and train until done, stopped, or beyond help. The run is `owner`'s already.

    `address` is the Ray cluster, instead of cluster.ray.address. `can_grow`: machines may join it later.

    Raises:
        CapstanError: with the exit code that the process should end with.
    """
    run = owner.run
    forget_own_stop(run)

    def work(journal: Journal) -> None:
        cluster = address_of(config, address)
        with joined_ray(cluster) if cluster else nullcontext() as dashboard:
            compile_and_train(config, owner, journal, resume=resume, dashboard=dashboard, log=log, can_grow=can_grow)

    def show(done: threading.Event) -> None:
        if live:
            watch(run, done.is_set)
        else:
            follow_lines(run, done.is_set, config.track.print_steps, log)

    try:
        with stop_on_signals(owner), helper_thread(show, "progress", patience=5):
            journal = Journal(run, log)  # whoever sees its first line may send a signal
            with journal.to_the_end():
                beside_main_thread(partial(work, journal))
    finally:
        if not owner.lost:
            forget_own_stop(run)
            keep_report(run, log)


def compile_and_train(
    config: Config,
    owner: Ownership,
    journal: Journal,
    *,
    resume: bool,
    dashboard: str | None,
    log: Callable[[str], None],
    can_grow: bool = True,
) -> None:
    """Do the work of a driver, without its signals.

    `dashboard` is the dashboard of the cluster which this process has joined, if it has. `can_grow` is that of `drive`.

    Raises:
        CapstanError: the run's own.
    """
    forget_given_up(owner.run)
    compilation = Compilation(config, owner.run, log)
    datasets, rest = compilation.begin(on_cluster=dashboard is not None)
    attempts = Attempts(config, datasets, owner, resume)
    with compilation.beside(rest):
        ranks = ranks_here(config) if dashboard is None else None
        if ranks is not None:
            with sidecars_here(config, owner.run, journal.write):
                run_here(attempts, ranks, journal.write)
        else:
            run_on_ray(attempts, dashboard, journal.write, can_grow=can_grow)


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


@contextmanager
def stop_on_signals(owner: Ownership) -> Iterator[None]:
    """Turn SIGTERM, SIGUSR1 and Ctrl-C into a stop request in the run's folder, once the store takes it.

    A second Ctrl-C ends this process at once.
    """
    over = threading.Event()

    def ask(number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        # The request is made in a thread: a store that does not answer must not delay this process's next signal.
        threading.Thread(target=_ask, args=(owner, name, over), name="stop", daemon=True).start()
        if number == signal.SIGINT:
            say("stopping after a commit; Ctrl-C again ends at once")
            signal.signal(signal.SIGINT, lambda *_: os._exit(ENDED_AT_ONCE))

    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    try:
        yield
    finally:
        over.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask(owner: Ownership, name: str, over: threading.Event) -> None:
    told = False
    while not over.is_set():
        if owner.lost:  # a request would stop the start that has the run now
            say(f"{name}: {owner.run.uri} has been taken over by another start, so this one ends")
            os._exit(ENDED_AT_ONCE)
        try:
            request_stop(owner.run, by=name)
            return
        except StorageError as error:
            if not told:
                say(f"{name}: the run could not be asked to stop, and is asked again until it can be: {error}")
            told = True
        over.wait(_LOOK_SECONDS)


def forget_own_stop(folder: Store) -> None:
    """Clear stop requests made by signals or by the compilation, so they do not stop the next start.

    A person's request stays.
    """
    if stop_requester(folder) in {BY_COMPILATION, *(number.name for number in _SIGNALS)}:
        folder.delete(layout.STOP)


def beside_main_thread(work: Callable[[], None]) -> None:
    """Run `work` in a thread, and raise here what it raises.

    In the main thread Ray would install handlers of its own.
    """
    done = in_thread(work, "driver")
    while not wait([done], timeout=0.2).done:  # short: Python runs signal handlers only between its own instructions
        for number in _SIGNALS:
            signal.signal(number, signal.getsignal(number))  # before Ray's own, which print a stack trace first
    done.result()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launcher.drive.driver", description=__doc__)
    parser.add_argument("run", metavar="RUN_URI", help="the run's folder, as `capstan submit` printed it")
    parser.add_argument("--submission", required=True, help="the run's owner until now")
    parser.add_argument("--resume", action="store_true", help="end with exit code 7 when nothing is committed")
    parser.add_argument("--address", help="the Ray cluster, instead of cluster.ray.address")
    parser.add_argument(
        "--fixed",
        action="store_true",
        help="machines join the cluster only before the first start, as in a Slurm job",
    )
    given = parser.parse_args()

    try:
        run = open_store(given.run)
        config = submitted_config(run)
        claim = turn(config, given.submission, by="capstan submit", log=say)
        try:
            with claim as owner:
                where = {"address": given.address, "can_grow": not given.fixed}
                drive(config, owner, resume=given.resume, live=False, log=say, **where)
        except Superseded:
            raise  # the run's records are another start's
        except CapstanError as error:
            record_end(run, str(error), stopped=isinstance(error, Stopped))
            raise
        except Exception as error:
            record_end(run, f"the driver failed: {type(error).__name__}: {error}", crash=True)
            raise
    except CapstanError as error:
        say(f"capstan: {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
