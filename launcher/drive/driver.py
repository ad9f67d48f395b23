"""The process that owns a run: it has the data compiled, keeps the ranks alive on Ray or on this machine, and ends with
the run's exit code.

    python -m launcher.drive.driver RUN_URI --submission ID [--resume] [--address HOST:PORT]

drives a run whose folder `capstan submit` has made: the entrypoint of a Ray job, or of a batch script on its own Ray.
`capstan train` and `capstan resume` do the same in the foreground.

docs/architecture.md has the files that a submission and a failure pass, in their order. A signal or `capstan stop` is
no
failure: it becomes the key STOP in the run's folder (signals.py), which the ranks obey at their next step, and the
driver before it has ranks (start/attempts.py).
"""

import argparse
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial

from launcher.cluster.ray.cluster import address_of, joined_ray
from launcher.cluster.ray.train import run_on_ray
from launcher.drive.compiling import Compilation
from launcher.drive.signals import beside_main_thread, forget_own_stop, stop_on_signals
from launcher.report.report import keep_report
from launcher.start.attempts import Attempts
from launcher.start.claim import turn
from launcher.start.local_ranks import ranks_here, run_here
from launcher.start.sidecars import sidecars_here
from launcher.view.logs import follow_lines
from launcher.view.tables import watch
from trainer.config import Config
from trainer.data.dataset.chapters import forget_given_up
from trainer.errors import CapstanError, NotFound, Stopped, Superseded
from trainer.processes.helper_thread import helper_thread
from trainer.run import layout
from trainer.run.background import Harmless, say
from trainer.run.folder import submitted_config
from trainer.run.owner import Ownership
from trainer.run.records import record_end
from trainer.store.store import Store, open_store


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
) -> None:
    """Compile what is missing and train until done, stopped, or beyond help. The run is `owner`'s already.

    Raises:
        CapstanError: with the exit code that the process should end with.
    """
    run = owner.run
    forget_own_stop(run)

    def work(journal: Journal) -> None:
        cluster = address_of(config, address)
        with joined_ray(cluster) if cluster else nullcontext() as dashboard:
            compile_and_train(config, owner, journal, resume=resume, dashboard=dashboard, log=log)

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
) -> None:
    """Do the work of a driver, without its signals.

    `dashboard` is the dashboard of the cluster which this process has joined, if it has.

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
            run_on_ray(attempts, dashboard, journal.write)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launcher.drive.driver", description=__doc__)
    parser.add_argument("run", metavar="RUN_URI", help="the run's folder, as `capstan submit` printed it")
    parser.add_argument("--submission", required=True, help="the run's owner until now")
    parser.add_argument("--resume", action="store_true", help="end with exit code 7 when nothing is committed")
    parser.add_argument("--address", help="the Ray cluster, instead of cluster.ray.address")
    given = parser.parse_args()

    try:
        run = open_store(given.run)
        config = submitted_config(run)
        claim = turn(config, given.submission, by="capstan submit", log=say)
        try:
            with claim as owner:
                drive(config, owner, resume=given.resume, live=False, log=say, address=given.address)
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
