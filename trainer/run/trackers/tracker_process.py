"""A tracker in a process of its own: the training neither waits for a service nor ends with it."""

import json
import os
import select
import subprocess
import sys
from contextlib import suppress

from trainer.config import Config, dump_config
from trainer.processes import children
from trainer.run.background import say
from trainer.run.trackers.tracker import Tracker

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
