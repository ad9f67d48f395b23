"""What is asked of a run that goes on, through its folder: to stop, or to be started again by its driver."""

import json
import os
import socket
import time
from contextlib import suppress

from trainer.errors import NotFound
from trainer.run import layout
from trainer.store import Store


def request_stop(run: Store, by: str | None = None) -> None:
    """Ask the run to commit a checkpoint and end. `by` says who asks; the default names this process and host."""
    request = {"time": time.time(), "by": by or f"process {os.getpid()} on {socket.gethostname()}"}
    run.put(layout.STOP, json.dumps(request).encode())


def request_restart(run: Store, reason: str) -> None:
    """Ask the ranks to commit a checkpoint and end, so that the driver starts them again; `reason` completes "stopped"."""
    run.put(layout.RESTART, json.dumps({"time": time.time(), "reason": reason}).encode())


def stop_requester(run: Store) -> str | None:
    """Who has asked the run to stop; None when nobody has."""
    with suppress(NotFound):
        return json.loads(run.get(layout.STOP))["by"]
    return None
