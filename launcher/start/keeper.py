"""A process from which the ranks of a machine are forked, and that keeps memory for them when they die.

A rank that is started anew imports for longer than it does anything else, and then reads its share of the base and the
newest checkpoint. A keeper has imported everything once. Each rank that it forks finds what the one before it has left
in memory (`trainer.state.kept`): its share of the base, and what learns after the last update.

    python -m launcher.start.keeper SOCKET GPUS

SOCKET is the number of a socket that listens at a name of this machine alone. GPUS is `cluster.gpus_per_worker`, or
`any`. Whoever wants a rank connects, and sends a file with what it asks for, and the rank's standard output and error:

    {"arguments", "environment"}    ->  {"pid"}, the rank's own {"step"} if it is to tell, and {"ended"} at its end
    {"signal"}                      passes a signal on to the rank; SIGUSR2 says that its machine is about to leave

A rank is killed when its connection ends, so it ends with the process that has asked for it: the driver of `capstan
train`, a task of srun, or a worker of Ray Train. The keeper is a child of what outlives these: the driver, another step
of the job, or an actor. It listens to processes of its own user only. The keeper itself opens no store, begins no
device and joins no group, because a fork takes along neither their threads nor their connections.
"""

import gc
import json
import os
import secrets
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trainer.processes import children, guard

if TYPE_CHECKING:
    from trainer.state.kept import Address, Kept

_MESSAGE_BYTES = 2**16
_CREDENTIALS = struct.Struct("3i")  # of SO_PEERCRED: process, user, group
_CONNECT_SECONDS = 20.0


class Unprepared(Exception):
    """No rank can be forked here. The text says why."""


class Forked:
    """A rank that a keeper has forked, as `subprocess.Popen` shows a process. `observe` gets its steps' records."""

    def __init__(self, line: socket.socket, pid: int, observe: Callable[[Mapping[str, Any]], None]) -> None:
        self._line, self.pid, self._observe = line, pid, observe
        self.returncode: int | None = None
        self.ended_at: float | None = None
        """When the keeper has seen its end, in seconds since 1970."""

    def poll(self) -> int | None:
        """How it has ended, as `Popen.poll` says it. A rank whose keeper is gone was killed with it."""
        while self.returncode is None and (told := _hear(self._line, 0)) is not None:
            self._take(told)
        return self.returncode

    def signal(self, number: int) -> None:
        with suppress(OSError):  # the keeper is gone, and the rank with it
            _tell(self._line, signal=number)

    def kill(self) -> None:
        if self.poll() is None:
            self.signal(signal.SIGKILL)

    def heard(self, seconds: float) -> int | None:
        """How it has ended, as `poll` says it, after so many seconds or sooner."""
        if self.returncode is None and (told := _hear(self._line, seconds)) is not None:
            self._take(told)
        return self.returncode

    def wait(self) -> int:
        while (code := self.heard(60)) is None:
            pass
        return code

    def _take(self, told: Mapping[str, Any]) -> None:
        if "step" in told:
            self._observe(told["step"])
        if "ended" in told:
            self.returncode, self.ended_at = told["ended"], told.get("at")
            self._line.close()


class Keeper:
    """The keeper that listens at `name`, as those see it who ask it for ranks."""

    def __init__(self, name: str) -> None:
        self.name = name

    def start(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        outputs: tuple[int, int],
        observe: Callable[[Mapping[str, Any]], None] = lambda record: None,
    ) -> Forked:
        """Fork the rank that `environment` describes, with these files as its standard output and error.

        Raises `Unprepared` if the keeper cannot fork any.
        """
        request = {"arguments": list(arguments), "environment": dict(environment)}
        line = self._connected()
        with open(os.memfd_create("request"), "w+b", buffering=0) as file:
            file.write(json.dumps(request).encode())
            told = None
            with suppress(OSError):
                socket.send_fds(line, [b"{}"], [file.fileno(), *outputs])
                told = _hear(line, None)
        if told is None or "pid" not in told:
            line.close()
            raise Unprepared((told or {}).get("refused", "the keeper has ended"))
        return Forked(line, told["pid"], observe)

    def _connected(self) -> socket.socket:
        """A connection to the keeper. One that is just being started is waited for."""
        deadline = time.monotonic() + _CONNECT_SECONDS
        while True:
            line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                line.connect(f"\0{self.name}")
            except OSError:
                line.close()
                if time.monotonic() > deadline or self.is_gone():
                    raise Unprepared("the keeper has ended") from None
                time.sleep(0.1)
                continue
            if not _is_ours(line):
                line.close()
                raise Unprepared("another user has taken the keeper's name")
            return line

    def is_gone(self) -> bool:
        """Whether the keeper has certainly ended."""
        return False


class OwnKeeper(Keeper):
    """A keeper that is a child of this process, for as long as the `with` block. It dies with the thread that makes
    it.
    """

    def __init__(self, gpus_per_worker: int | None) -> None:
        super().__init__(f"capstan-keeper-{secrets.token_hex(16)}")
        with listening(self.name) as line:
            self._process = children.start(
                keeper_command(line, gpus_per_worker),
                pass_fds=[line.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # a rank that is started without it has the same to say
                start_new_session=True,  # the driver tells the ranks of a Ctrl-C
            )

    def __enter__(self) -> "OwnKeeper":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def is_gone(self) -> bool:
        return self._process.poll() is not None


def listening(name: str) -> socket.socket:
    """The socket at which a keeper of this name listens. Raises `OSError` if the name is taken on this machine."""
    line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    line.bind(f"\0{name}")
    line.listen(1024)
    return line


def keeper_command(line: socket.socket, gpus_per_worker: int | None) -> list[str]:
    """The command of a keeper that listens at `line`, which it inherits."""
    gpus = "any" if gpus_per_worker is None else str(gpus_per_worker)
    return [sys.executable, "-m", "launcher.start.keeper", str(line.fileno()), gpus]


def _is_ours(line: socket.socket) -> bool:
    """Whether the process at the other end belongs to this one's user."""
    _, user, _ = _CREDENTIALS.unpack(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return user == os.geteuid()


def _tell(line: socket.socket, **facts: Any) -> None:
    line.send(json.dumps(facts).encode())


def _hear(line: socket.socket, seconds: float | None) -> dict[str, Any] | None:
    """Return the message that comes over a line within so many seconds (None waits), or None. If the line has ended, so
    has the rank.
    """
    try:
        line.settimeout(seconds)
        data = line.recv(_MESSAGE_BYTES)
    except (BlockingIOError, TimeoutError):
        return None
    except OSError:
        data = b""
    return json.loads(data) if data else {"ended": -signal.SIGKILL}


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # a job asks so at its end; ranks end with their keeper
    line, gpus = socket.socket(fileno=int(sys.argv[1])), sys.argv[2]
    from launcher.start.group import imported_rank

    imported_rank(None if gpus == "any" else int(gpus))
    from launcher.start.local_ranks import run_task
    from trainer.processes.accelerator import is_begun

    if is_begun():
        _refuse(line, "the imports of a rank begin CUDA on this machine, which a forked process cannot use")
    gc.collect()
    gc.freeze()  # a collection in a rank would otherwise write to every page that it shares with the keeper
    forked = _serve(line)
    task, outcome = map(Path, forked.request["arguments"])
    try:
        run_task(task, outcome, forked)
    except SystemExit:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # threads may still wait, such as for an adapter's files, and hold up the next rank


@dataclass(frozen=True)
class ForkedHere:
    """This process as a rank that a keeper has forked: what it was asked for, its memory and its line to the asker."""

    request: Mapping[str, Any]
    kept: "Kept"
    line: socket.socket
    leaving: threading.Event = field(default_factory=threading.Event)

    def stepped(self, record: Mapping[str, float]) -> None:
        """Tell the asker of a step. It may be too busy to hear of each."""
        with suppress(OSError):
            self.line.send(json.dumps({"step": record}).encode(), socket.MSG_DONTWAIT)


def _refuse(line: socket.socket, why: str) -> NoReturn:
    """Tell everybody who asks for a rank why there is none."""
    while True:
        asker, _ = line.accept()
        with asker, suppress(OSError):
            _tell(asker, refused=why)
            asker.recv(1)  # until it has read that


class _Memory:
    """The memory of the ranks that were forked here. Ranks of a world of another size have other shares."""

    def __init__(self) -> None:
        self._world_size: str | None = None
        self._kept: dict[str, Kept] = {}
        self._holder: Address | None = None

    def of(self, environment: Mapping[str, str]) -> "Kept":
        """The memory of the rank that this environment describes."""
        from trainer.state.kept import Kept

        rank, world_size = environment.get("RANK", "0"), environment.get("WORLD_SIZE", "1")
        if world_size != self._world_size:
            for kept in self._kept.values():
                kept.close()
            self._kept, self._world_size = {}, world_size
        if self._holder is None and environment.get("LOCAL_WORLD_SIZE", world_size) != world_size:
            self._holder = _holder(environment["MASTER_ADDR"])
        if rank not in self._kept:
            self._kept[rank] = Kept.made(f"rank {rank}", self._holder)
        return self._kept[rank]


def _holder(first: str) -> "Address | None":
    """Fork the process that holds copies for the ranks of other machines. None if this machine has no address."""
    from trainer.state.neighbour import Holder

    try:
        holder = Holder(first)
    except OSError:
        return None
    keeper = os.getpid()
    if os.fork() == 0:
        guard.tie()
        # Whoever has asked for a rank is not to wait for this process to close the rank's output.
        os.closerange(3, holder.fileno())
        os.closerange(holder.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        if os.getppid() == keeper:
            holder.serve()
        os._exit(1)
    holder.close()
    return holder.address


@dataclass
class _Asker:
    """A process that asks for a rank, and the rank's process once it is there."""

    line: socket.socket
    pid: int | None = None


def _serve(line: socket.socket) -> ForkedHere:
    """Fork ranks for those who ask. Returns in the forked processes only."""
    keeper, memory, askers = os.getpid(), _Memory(), selectors.DefaultSelector()
    askers.register(line, selectors.EVENT_READ)
    while True:
        for key, _ in askers.select():
            asker: _Asker | None = key.data
            if asker is None:
                found, _ = line.accept()
                if _is_ours(found):
                    askers.register(found, selectors.EVENT_READ, _Asker(found))
                else:
                    found.close()
            elif key.fileobj is not asker.line:
                _ended(asker, askers, key.fd)
            elif (request := _request(asker, askers)) is not None:
                files, asked = request
                kept = memory.of(asked["environment"])
                asker.pid = os.fork()
                if asker.pid == 0:
                    _become(asker, askers, keeper, files, asked)
                    return ForkedHere(asked, kept, asker.line)
                for file in files:
                    os.close(file)
                askers.register(os.pidfd_open(asker.pid), selectors.EVENT_READ, asker)
                with suppress(OSError):  # that it is gone is seen in the next turn
                    _tell(asker.line, pid=asker.pid)


def _request(asker: _Asker, askers: selectors.BaseSelector) -> tuple[list[int], dict[str, Any]] | None:
    """Take in what comes from an asker. Returns the rank's output files and the request, if a rank is asked for."""
    try:
        data, files, _, _ = socket.recv_fds(asker.line, _MESSAGE_BYTES, 3)
    except OSError:
        data, files = b"", []
    if data and asker.pid is not None:
        os.kill(asker.pid, json.loads(data)["signal"])
    elif data and len(files) == 3:
        with open(files[0], "rb") as file:
            file.seek(0)
            return files[1:], json.loads(file.read())
    else:  # it has ended
        askers.unregister(asker.line)
        asker.line.close()
        if asker.pid is not None:
            os.kill(asker.pid, signal.SIGKILL)
    return None


def _ended(asker: _Asker, askers: selectors.BaseSelector, process: int) -> None:
    """Tell the asker how its rank has ended."""
    assert asker.pid is not None
    askers.unregister(process)
    os.close(process)
    _, status = os.waitpid(asker.pid, 0)
    asker.pid = None
    with suppress(OSError, KeyError):  # it is gone
        _tell(asker.line, ended=os.waitstatus_to_exitcode(status), at=time.time())
        askers.unregister(asker.line)
    asker.line.close()


def _become(
    asker: _Asker, askers: selectors.BaseSelector, keeper: int, files: Sequence[int], request: Mapping[str, Any]
) -> None:
    """Make this forked process a rank: of a session of its own, with its own streams and environment."""
    guard.tie()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if os.getppid() != keeper:  # it ended before this process could be tied to it
        os._exit(1)
    os.setsid()
    for key in list(askers.get_map().values()):
        if key.fd != asker.line.fileno():
            os.close(key.fd)
    askers.close()
    for file, stream in zip(files, (sys.stdout, sys.stderr), strict=True):
        os.dup2(file, stream.fileno())
        os.close(file)
    os.environ.update(request["environment"])


if __name__ == "__main__":
    main()
