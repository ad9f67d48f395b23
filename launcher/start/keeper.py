"""A process from which the ranks of this machine are forked, and that keeps memory for them when they die.

A rank that is started anew imports for longer than it does anything else, and then reads its share of the base and the
newest checkpoint. A keeper has imported everything once. Each rank that it forks finds what the one before it has left
in memory (`trainer.state.kept`): its share of the base, and what learns after the last update.

    python -m launcher.start.keeper SOCKET GPUS RANKS

SOCKET is the number of an open socket to the driver, which sends a request for each rank:

    {"rank", "arguments", "environment", "said"}     ->  {"pid"}, and when it has ended {"ended", "code"}

GPUS is `cluster.gpus_per_worker`, or `any`. The keeper itself opens no store, begins no device and joins no group,
because a fork takes along neither their threads nor their connections. It ends with the driver, and the ranks end with
it.
"""

import gc
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from trainer.processes import children, guard

_MESSAGE_BYTES = 2**16


class Unprepared(Exception):
    """No rank can be forked here. The text says why."""


class Forked:
    """A rank that the keeper has forked, as `subprocess.Popen` shows a process."""

    def __init__(self, keeper: "Keeper", pid: int) -> None:
        self._keeper, self.pid = keeper, pid

    @property
    def returncode(self) -> int | None:
        return self._keeper.ended.get(self.pid)

    def poll(self) -> int | None:
        """How it has ended, as `Popen.poll` says it. A rank whose keeper is gone was killed with it."""
        if self.returncode is None and not self._keeper.hear(0):
            self._keeper.ended.setdefault(self.pid, -signal.SIGKILL)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        while (code := self.poll()) is None:
            self._keeper.hear(0.1)
        return code


class Keeper:
    """The keeper of `ranks` ranks, for as long as the `with` block. It dies with the thread that makes it.

    Raises `Unprepared`, when a rank is asked for, if the keeper cannot fork any.
    """

    def __init__(self, gpus_per_worker: int | None, ranks: int) -> None:
        self.ended: dict[int, int] = {}
        self._forked: int | None = None
        self._refused: str | None = None
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        gpus = "any" if gpus_per_worker is None else str(gpus_per_worker)
        with theirs:
            self._process = children.start(
                [sys.executable, "-m", "launcher.start.keeper", str(theirs.fileno()), gpus, str(ranks)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # a rank that is started without it has the same to say
                start_new_session=True,  # the driver tells the ranks of a Ctrl-C
            )

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.close()
        self._process.kill()
        self._process.wait()

    def start(self, rank: int, arguments: Sequence[str], environment: Mapping[str, str], said: Path) -> Forked:
        """Fork the rank of this number. What it writes to its standard error goes to the file `said`."""
        request = {"rank": rank, "arguments": list(arguments), "environment": dict(environment), "said": str(said)}
        try:
            self._line.send(json.dumps(request).encode())
        except OSError:
            raise Unprepared("the keeper has ended") from None
        self._forked = None
        while self._forked is None:
            if not self.hear(None):
                raise Unprepared("the keeper has ended")
            if self._refused:
                raise Unprepared(self._refused)
        return Forked(self, self._forked)

    def hear(self, seconds: float | None) -> bool:
        """Take in what the keeper tells within so many seconds (None waits). Returns whether it is still there."""
        try:
            self._line.settimeout(seconds)
            while data := self._line.recv(_MESSAGE_BYTES):
                told = json.loads(data)
                self._forked = told.get("pid", self._forked)
                self._refused = told.get("refused")
                if "ended" in told:
                    self.ended[told["ended"]] = told["code"]
                self._line.settimeout(0)
            return False
        except (BlockingIOError, TimeoutError):
            return True
        except OSError:
            return False


def main() -> None:
    line, (gpus, ranks) = socket.socket(fileno=int(sys.argv[1])), sys.argv[2:]
    from launcher.start.group import imported_rank

    imported_rank(None if gpus == "any" else int(gpus))
    from launcher.start.local_ranks import run_task
    from trainer.processes.accelerator import is_begun
    from trainer.state.kept import Kept

    if is_begun():
        _tell(line, refused="the imports of a rank begin CUDA on this machine, which a forked process cannot use")
        line.recv(1)  # until the driver goes on without a keeper
        return
    kept = [Kept.made(f"rank {rank}") for rank in range(int(ranks))]
    gc.collect()
    gc.freeze()  # a collection in a rank would otherwise write to every page that it shares with the keeper
    if (request := _serve(line)) is not None:
        task, outcome = map(Path, request["arguments"])
        run_task(task, outcome, kept[request["rank"]])


def _tell(line: socket.socket, **facts: Any) -> None:
    line.send(json.dumps(facts).encode())


def _serve(line: socket.socket) -> dict[str, Any] | None:
    """Fork ranks until the driver is gone. In each of them, return its request; in the keeper, None."""
    with selectors.DefaultSelector() as found:
        found.register(line, selectors.EVENT_READ)
        while True:
            for key, _ in found.select():
                if key.data is not None:  # the end of a rank
                    found.unregister(key.fd)
                    os.close(key.fd)
                    _, status = os.waitpid(key.data, 0)
                    _tell(line, ended=key.data, code=os.waitstatus_to_exitcode(status))
                    continue
                data = line.recv(_MESSAGE_BYTES)
                if not data:
                    return None
                keeper, request = os.getpid(), json.loads(data)
                pid = os.fork()
                if pid == 0:
                    for number in [key.fd for key in found.get_map().values() if key.data is not None]:
                        os.close(number)
                    line.close()
                    _become(request, keeper)
                    return request
                found.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
                _tell(line, pid=pid)


def _become(request: dict[str, Any], keeper: int) -> None:
    """Make this forked process a rank: of a session of its own, with its own streams and environment."""
    guard.tie()
    if os.getppid() != keeper:  # it ended before this process could be tied to it
        os._exit(1)
    os.setsid()
    said = os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(said, sys.stderr.fileno())
    os.close(said)
    os.environ.update(request["environment"])


if __name__ == "__main__":
    main()
