"""The process that owns a run: it has the data compiled, keeps the ranks alive on Ray, and ends with the run's exit code.

    python -m launcher.drive.driver RUN_URI [--resume] [--address HOST:PORT]

drives a run whose folder `capstan submit` has made: the entrypoint of a Ray job, or of a batch script on its own Ray.
`capstan train` and `capstan resume` do the same in the foreground. SIGTERM, SIGUSR1 and `capstan stop` end it with exit
code 75 once the ranks have committed; started again, it goes on from the newest commit by itself.
"""

import argparse
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress

from launcher.drive import compiling
from launcher.ray.cluster import address_of, joined_ray
from launcher.ray.train import run_on_ray
from launcher.view.tables import watch
from trainer.config import Config
from trainer.errors import CapstanError, NotFound, Stopped, StorageError
from trainer.run import layout
from trainer.run.folder import run_config, run_folder
from trainer.run.records import record_end
from trainer.run.requests import request_stop, stop_requester
from trainer.scratch import collect_leftovers
from trainer.store import Store, open_store


def drive(config: Config, *, resume: bool, live: bool, log: Callable[[str], None], address: str | None = None) -> None:
    """Compile what is missing and train until done, stopped, or beyond help; the run's name is claimed already.

    Raises:
        CapstanError: with the exit code that the process should end with.
    """
    collect_leftovers()
    run = run_folder(config)
    _forget_own_stop(run)
    run.delete(layout.NO_MORE_DATA)
    journal = _Journal(run, log)

    def work() -> None:
        cluster = address_of(config, address)
        with joined_ray(cluster) if cluster else nullcontext() as dashboard:
            compilation = compiling.Compilation(config, run, log)
            datasets, rest = compilation.begin(on_cluster=bool(cluster))
            with compilation.beside(rest):
                run_on_ray(config, datasets, run, resume=resume, dashboard=dashboard, log=journal.write)

    try:
        # Beside the main thread, which is then free for signals: in it, Ray would install handlers of its own.
        with _stop_on_signals(run), _live(run, live):
            _in_a_thread(work)
    except CapstanError as error:
        journal.keep(f"ended with exit code {error.exit_code}: {error}")
        raise
    else:
        journal.keep("finished")
    finally:
        _forget_own_stop(run)


class _Journal:
    """The driver's few words, on its own output and in the run's folder, after those of the drivers before."""

    def __init__(self, run: Store, log: Callable[[str], None]) -> None:
        self._run, self._log = run, log
        self._text = ""
        with suppress(NotFound):
            self._text = run.get(layout.DRIVER_LOG).decode(errors="replace")
        self.keep(f"driver of process {os.getpid()} on {socket.gethostname()}")

    def write(self, line: str) -> None:
        self._log(line)
        self.keep(line)

    def keep(self, line: str) -> None:
        self._text += f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n"
        with suppress(StorageError):  # words must never decide how a run ends
            self._run.put(layout.DRIVER_LOG, self._text.encode())


def _in_a_thread(work: Callable[[], None]) -> None:
    done: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    thread = threading.Thread(target=run, name="driver", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.2)  # short, as Python runs signal handlers only between its own instructions
        for number in _SIGNALS:
            signal.signal(number, signal.getsignal(number))  # above Ray's own, which print a stack trace first
    done.result()


def _forget_own_stop(run: Store) -> None:
    """A stop that a signal or the compilation asked for ends this process's work, not the next one's; a person's stays."""
    if stop_requester(run) in {compiling.BY, *(number.name for number in _SIGNALS)}:
        run.delete(layout.STOP)


_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextmanager
def _stop_on_signals(run: Store) -> Iterator[None]:
    """SIGTERM, SIGUSR1 and Ctrl-C ask the ranks to commit and stop, which ends this process with exit code 75.

    A second Ctrl-C ends it at once.
    """

    def ask(number: int, _frame: object) -> None:
        request_stop(run, by=signal.Signals(number).name)
        if number == signal.SIGINT:
            print("stopping after a commit; Ctrl-C again ends at once", file=sys.stderr, flush=True)
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))

    before = {number: signal.signal(number, ask) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _live(run: Store, on: bool) -> Iterator[None]:
    """Show the run's progress on stderr, from its folder, while ranks work."""
    done = threading.Event()
    viewer = threading.Thread(target=watch, args=(run, done.is_set), name="live", daemon=True)
    if on:
        viewer.start()
    try:
        yield
    finally:
        done.set()
        if on:
            viewer.join(timeout=5)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launcher.drive.driver", description=__doc__)
    parser.add_argument("run", metavar="RUN_URI", help="the run's folder, as `capstan submit` printed it")
    parser.add_argument("--resume", action="store_true", help="end with exit code 7 when nothing is committed")
    parser.add_argument("--address", help="the Ray cluster, instead of cluster.ray.address")
    given = parser.parse_args()

    def log(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        run = open_store(given.run)
        config = run_config(run)
        try:
            drive(config, resume=given.resume, live=False, log=log, address=given.address)
        except CapstanError as error:
            record_end(run, str(error), stopped=isinstance(error, Stopped))
            raise
        except Exception as error:
            record_end(run, f"the driver failed: {type(error).__name__}: {error}", crash=True)
            raise
    except CapstanError as error:
        log(f"capstan: {error}")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
