"""A tracker in a process beside rank 0, which shows a run's records in one service. The training waits for neither.

`TrackerProcess` is rank 0's side: it starts the process and tells it when the run is over. The process reads the
records of all starts in the run's folder, so a service that was away, or is new to the run, gets what it lacks. If
rank 0 is killed, the process lives a few seconds longer. The next start shows what is then left over.
"""

import json
import os
import secrets
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from io import FileIO

from trainer.config import Config, dump_config, parse_config
from trainer.config.secrets import masked
from trainer.errors import Damaged, NotFound
from trainer.processes import children
from trainer.run import layout
from trainer.run.background import say
from trainer.run.folder import name_of, run_folder
from trainer.run.records import Record, RunReader, starts_in
from trainer.run.segments import streams
from trainer.run.trackers import Page, Service, Tracker, Unshown, find_service
from trainer.store.store import Store, read_json

LOOK_SECONDS = 10.0
_LONGEST_PAUSE = 600.0
_AFTER_KILL_SECONDS = 3.0
ROWS = 100
"""Rows that a service is given at a time."""


@dataclass(frozen=True)
class ServiceState:
    """The part of a service's state that lies in the run's folder.

    It is the `id` of the run there, and the last step `shown`.

    A copy of the folder is a run of its own, under another name, and gets an id of its own.
    """

    id: str
    run: str
    shown: int

    @staticmethod
    def read(folder: Store, tracker: str) -> "ServiceState":
        name = name_of(folder)
        with suppress(NotFound, TypeError, Damaged):
            kept = ServiceState(**read_json(folder, layout.tracker(tracker)))
            if kept.run == name:
                return kept
        return ServiceState(secrets.token_hex(4), name, -1)

    def write(self, folder: Store, tracker: str) -> None:
        folder.put(layout.tracker(tracker), json.dumps(asdict(self)).encode())


class Companion:
    """Brings the records of a run to a service, up to those of `generation`.

    `opens` makes the service once the run's ranks have begun.
    """

    def __init__(self, folder: Store, generation: int, tracker: str, opens: Callable[[ServiceState], Service]) -> None:
        self._run, self._generation, self._tracker, self._opens = folder, generation, tracker, opens
        self._reader = RunReader(folder)
        self._held: list[Record] = []
        self._begun = False
        self._service: Service | None = None
        self._rows = Unshown(-1)
        self.superseded = False

    def look(self) -> None:
        """Show what is new.

        Raises the errors of the store and of the service. What was not shown is tried again at the next look.
        """
        found = streams(self._run.list(layout.METRICS))
        self.superseded = starts_in(found)[-1:] > [self._generation]
        if self.superseded:  # the process beside the newer start shows the rest, including this start's
            return
        for number, new in self._reader.read(found):
            records = list(new)
            self._held += records
            # Open the service only now: the process beside an earlier start may still be working.
            self._begun |= number == self._generation and any(record["kind"] == "start" for record in records)
        if self._begun:
            self._show()

    def _show(self) -> None:
        kept = ServiceState.read(self._run, self._tracker)
        if self._service is None:
            # Write the id before the service knows it: then a kill makes no second run there.
            kept.write(self._run, self._tracker)
            self._service = self._opens(kept)
            self._rows = Unshown(self._service.shown)
        for record in self._held:
            self._rows.add(record)
        self._held.clear()
        try:
            for rows in self._rows.batches(ROWS):
                self._service.show(rows)
        finally:
            if self._rows.shown != kept.shown:
                replace(kept, shown=self._rows.shown).write(self._run, self._tracker)

    def close(self) -> None:
        if self._service is not None and not self.superseded:
            self._service.close(self._rows.outcome)


def follow(companion: Companion, over: threading.Event, tracker: str) -> None:
    """Look again and again until rank 0 is `over`, then once more.

    A failure is reported once, and tried again less and less often. A failure of the last look is reported too.
    """
    pause, failing, ended = LOOK_SECONDS, False, False
    while not ended and not companion.superseded:
        ended = over.wait(pause)
        try:
            companion.look()
            if ended:
                companion.close()
            pause, failing = LOOK_SECONDS, False
        except Exception as error:
            if ended or not failing:
                first_line = (str(error).strip().splitlines() or [""])[0]
                again = "only the next start of the run tries it again" if ended else "it will be tried again"
                say(
                    f"sending the run to {tracker} failed, which does not end the run; {again}: {type(error).__name__}:"
                    f" {first_line}"
                )
            pause, failing = min(2 * pause, _LONGEST_PAUSE), True


def page(config: Config, folder: Store, kept: ServiceState) -> Page:
    """Return the run as a service gets to know it."""
    return Page(
        kept.id,
        config.track.name or config.run.name,
        config.track.project,
        config.track.group,
        config.track.tags,
        masked(config.model_dump(mode="json")),
        folder.local_folder and str(folder.local_folder),
        kept.shown,
    )


def _listen(stdin: FileIO, over: threading.Event, patience: float) -> None:
    """Wait for the end of rank 0, then limit the time that a service has for its own end.

    If rank 0 was killed the time is short: whoever kills a run wants it gone, and the next start shows what is left
    over.
    """
    if stdin.readall() != FAREWELL:  # it was killed, and nobody reads what this process prints
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        patience = _AFTER_KILL_SECONDS
    signal.setitimer(signal.ITIMER_REAL, patience)  # a timer of the kernel, because a service may hold all of Python
    over.set()


def main() -> None:
    # Read without a buffer: the waiting thread would hold the buffer's lock when this process ends first.
    stdin = FileIO(sys.stdin.fileno(), closefd=False)
    task = json.loads(stdin.readline())
    # This process is no child of rank 0: Ray ends the children of a rank that dies, and this process still has to show
    # what that rank has left.
    if os.fork():
        os._exit(0)
    config, tracker, over = parse_config(task["config"]), task["tracker"], threading.Event()
    threading.Thread(target=_listen, args=(stdin, over, task["patience"]), name="listen", daemon=True).start()
    run = run_folder(config)
    service = find_service(tracker)
    companion = Companion(run, task["generation"], tracker, lambda kept: service.opens(page(config, run, kept)))
    follow(companion, over, tracker)


CLOSE_SECONDS = 120.0
"""The end of a run waits so long for a service."""
FAREWELL = b"over\n"
"""The last line to the process, which so knows an end of the run from a rank that was killed."""
# These services learn only the run's own curves, unless the user's environment says otherwise.
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


class TrackerProcess(Tracker):
    """The process that shows this generation's records in the tracker called `name`.

    The process reads the records in the run's folder. This object only starts it, and tells it when they are over.
    """

    seconds = 60.0

    def __init__(self, name: str, generation: int, config: Config) -> None:
        self.name = name
        self._told = False
        self._alive, alive = os.pipe()  # it ends when the process does
        # trainer.processes.children is not used here: this process outlives a killed rank by a few seconds, to show
        # what that rank has left.
        self._process = subprocess.Popen(
            children.apart([sys.executable, "-m", "trainer.run.trackers.companion"]),
            stdin=subprocess.PIPE,
            env={**_QUIET, **os.environ},
            pass_fds=(alive,),
            # Signals to the ranks' group, such as Ctrl-C, are not meant for this process.
            start_new_session=True,
        )
        os.close(alive)
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        task = {"tracker": name, "generation": generation, "config": dump_config(config), "patience": CLOSE_SECONDS + 5}
        self._stdin.write(json.dumps(task).encode() + b"\n")
        self._stdin.flush()

    def flush(self) -> None:
        if self._has_ended(within=0) and not self._told:
            self._told = True
            say(f"the process that shows the run by {self.name} has ended, which does not end the run.")

    def close(self) -> None:
        self.flush()
        with suppress(OSError):
            self._stdin.write(FAREWELL)
            self._stdin.close()
        if not self._has_ended(within=CLOSE_SECONDS):
            say(f"{self.name} did not finish within {CLOSE_SECONDS:.0f} s, which does not end the run; it is left.")
        self._process.wait()
        os.close(self._alive)

    def _has_ended(self, within: float) -> bool:
        return bool(select.select([self._alive], [], [], within)[0])


if __name__ == "__main__":
    main()
