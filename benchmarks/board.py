"""What `capstan board` takes of a core beside a run that trains: when nobody looks, and while somebody does.

    python benchmarks/board.py [--seconds 60]

A tiny model trains on this machine, a step in some tens of milliseconds, which is faster than any real run writes its
records. "looks" is a reader of the streams of the list of runs and of the run's page, as two open pages are. Ends with
exit code 1 when one of the bounds below is broken.
"""

import argparse
import http.client
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the tests' workshop

from tests.material import Workshop
from trainer.config import dump_config

MOST_IDLE, MOST_LOOKED_AT = 0.03, 0.10
"""Shares of a core."""
_CAPSTAN = (sys.executable, "-m", "launcher.cli")
_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@contextmanager
def started(*words: str, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    command, pipes = [*_CAPSTAN, *words], {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=folder, env=_ENVIRONMENT, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate()


class Looker(threading.Thread):
    """Reads a stream of the board until it is `over`, and counts its events."""

    def __init__(self, port: int, token: str, path: str) -> None:
        super().__init__(daemon=True)
        self.events, self.over = 0, False
        self._connection = http.client.HTTPConnection("127.0.0.1", port)
        self._connection.request("GET", path, headers={"Authorization": f"token {token}"})
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200, self._answer.read()

    def run(self) -> None:
        while not self.over and (line := self._answer.readline()):
            self.events += line.startswith(b"event:")
        self._connection.close()


def share(process: psutil.Process, seconds: float) -> float:
    """Return the share of a core that the process takes in so many seconds."""

    def spent() -> float:
        times = process.cpu_times()
        return times.user + times.system

    before, began = spent(), time.monotonic()
    time.sleep(seconds)
    return (spent() - before) / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        workshop = Workshop(folder)
        config = folder / "run.yaml"
        config.write_text(dump_config(workshop.config("beside", "train.steps=10000000")))
        with (
            started("train", str(config), folder=folder) as training,
            started("board", f"{folder}/store", "--port", "0", folder=folder) as board,
        ):
            assert training.stderr
            assert board.stderr
            threading.Thread(target=training.stderr.read, daemon=True).start()
            found = re.search(r":(\d+)/\?token=(\S+)", board.stderr.readline())
            assert found
            port, token = int(found[1]), found[2]
            while not list((folder / "store/beside").glob("metrics/*")):
                time.sleep(1)
            process = psutil.Process(board.pid)
            idle = share(process, seconds)
            lookers = [Looker(port, token, path) for path in ("/events", "/runs/0/beside/events")]
            for looker in lookers:
                looker.start()
            looked_at = share(process, seconds)
            for looker in lookers:
                looker.over = True
    events = sum(looker.events for looker in lookers)
    print(f"nobody looks: {idle:.1%} of a core (at most {MOST_IDLE:.0%})")
    print(f"two pages are open: {looked_at:.1%} of a core (at most {MOST_LOOKED_AT:.0%}), {events} events")
    sys.exit(idle > MOST_IDLE or looked_at > MOST_LOOKED_AT)


if __name__ == "__main__":
    main()
