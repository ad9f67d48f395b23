"""The one way to start another process, so that none outlives the one that needs it.

A process that is killed (`kill -9`, or by Linux where memory runs out) cannot end its children itself. A child
therefore ends by its own means: a command by Linux, which is asked to kill it with its parent; a worker of
multiprocessing by a thread that waits for the end of its parent. Each of ours starts its own children in the same way,
so grandchildren end too.

The command dies with the *thread* that starts it: start it from a thread that waits for it.

Nobody tells the ranks of one machine that were started by hand or by srun if one of them is killed: `Siblings` finds
them by their environment.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from trainer.processes import guard

_FAMILY = "CAPSTAN_FAMILY"
_SAFE_PATH = "PYTHONSAFEPATH"  # the variable for Python's -P
_OURS = Path(__file__).resolve().parents[2]
"""The folder that our own packages lie in."""
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""The variables that tell a process where it is among the ranks of its group, which are not those of what it starts."""


def run(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run` of a command that ends with this process."""
    try:
        return subprocess.run(_tied(command, options.get("cwd")), **options)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        error.cmd = list(command)  # what a message shows
        raise


def start(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """`subprocess.Popen` of a command that ends with this process."""
    return subprocess.Popen(_tied(command, options.get("cwd")), **options)


def apart(command: Sequence[str], folder: str | os.PathLike[str] | None = None) -> list[str]:
    """`command`, to run in `folder` or in the current one, without importing our modules' names from there: a torch.py
    that somebody has put into a shared folder is not torch. The folder is searched only if our own code lies there, as
    in a checkout that is not installed.
    """
    ours = [place for place, word in enumerate(command) if word == sys.executable]
    if not ours or list(command[ours[0] + 1 : ours[0] + 2]) not in (["-m"], ["-c"]) or is_checkout(folder):
        return list(command)
    begin = ours[0] + 1
    return [*command[:begin], "-P", *command[begin:]]


def is_checkout(folder: str | os.PathLike[str] | None = None) -> bool:
    """Whether our own code lies in `folder`, or in the current one."""
    return Path(folder or ".").resolve() == _OURS


@contextmanager
def spawned_apart() -> Iterator[None]:
    """Inside, what multiprocessing spawns imports nothing from the current folder, as in `apart`."""
    before = os.environ.get(_SAFE_PATH)
    if not is_checkout():
        os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        os.environ.pop(_SAFE_PATH, None)
        if before is not None:
            os.environ[_SAFE_PATH] = before


@contextmanager
def guarded() -> Iterator[Callable[[], list[int]]]:
    """Around work with a program that starts processes in its own way, such as Ray. If this process is killed,
    everything that was started in the body ends within seconds. Yields a function that finds what was started.
    """
    with _guard() as mark:
        os.environ[_FAMILY] = mark
        try:
            yield lambda: guard.started_with(os.fsencode(f"{_FAMILY}={mark}"))
        finally:
            os.environ.pop(_FAMILY, None)


@contextmanager
def family(command: Sequence[str], patience: float, **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A command that starts processes in its own way, such as vLLM. It and they end with the body, by SIGTERM and after
    `patience` seconds by SIGKILL, or within seconds if this process is killed. Raises `FileNotFoundError`.
    """
    given: dict[str, str] = options.pop("env", dict(os.environ))
    with _guard() as mark:
        # Not tied to this process, because the guard has to find the command alive to know what it has started.
        process = subprocess.Popen(
            [_found(command[0]), *command[1:]],
            env={**given, _FAMILY: mark},
            start_new_session=True,
            **options,
        )
        try:
            yield process
        finally:
            name = os.fsencode(f"{_FAMILY}={mark}")
            if process.poll() is None:
                guard.end(name, process.pid, patience=patience)
            else:  # Nobody ends the processes that it has left behind.
                guard.end(name, patience=0)
            with suppress(ProcessLookupError):  # what a command has left that was killed itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextmanager
def _guard() -> Iterator[str]:
    """A process that ends the family of the mark if this process is killed in the body."""
    mark = secrets.token_hex(8)
    environment = {name: value for name, value in os.environ.items() if name != _FAMILY}
    command = [sys.executable, "-I", "-S", str(Path(guard.__file__)), "end", f"{_FAMILY}={mark}"]
    # In a session of its own, because what ends the family, such as Ctrl-C twice, must not end its guard first.
    with subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True) as process:
        try:
            yield mark
        finally:
            process.communicate(b"over")


def _tied(command: Sequence[str], folder: str | os.PathLike[str] | None) -> list[str]:
    program = _found(command[0])  # the tied program would find out too late for the caller
    rest = apart(command, folder)[1:]
    return [sys.executable, "-I", "-S", str(Path(guard.__file__)), "tie", str(os.getpid()), program, *rest]


def _found(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise FileNotFoundError(f"{program}: not found")
    return path


def end_with_parent() -> None:
    """Make this worker of multiprocessing end with its parent. It would otherwise wait for the parent for ever."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def end_with_agent() -> None:
    """Make this rank end with torchrun's agent, which cannot end its ranks if it is killed. Does nothing without an
    agent.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ:
        guard.tie()
        if _is_orphan():  # the agent was killed before it could be tied to
            sys.exit(1)


def _is_orphan() -> bool:
    """Whether another process has adopted this one: the first process of the machine, or one that has asked for
    orphans, as systemd and the first processes of containers do. Torchrun's agent has torch loaded, and a program
    between it and the rank has the rank's variables.
    """
    parent, mine = Path(f"/proc/{os.getppid()}"), f"TORCHELASTIC_RUN_ID={os.environ['TORCHELASTIC_RUN_ID']}"
    try:
        between = os.fsencode(mine) in (parent / "environ").read_bytes().split(b"\0")
        return not between and b"libtorch" not in (parent / "maps").read_bytes()
    except PermissionError:  # it is another user's, as which no agent runs
        return True
    except OSError:  # it is outside of this container
        return False


_GONE_SECONDS = 5.0
_LATE_SECONDS = 30.0
"""A rank that is not there by then was killed before it was seen, or never started."""


class Siblings:
    """Finds the processes of the other ranks by the environment with which they were started.

    Where this process was not started with a rank of its own, as by Ray, or where ranks are on several machines or
    under torchrun's agent, which ends them itself, it knows nothing.
    """

    def __init__(
        self,
        started_with: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        find: Callable[..., list[int]] = guard.started_with,
    ) -> None:
        self._group = _group(_own_environment() if started_with is None else started_with)
        self._clock, self._find = clock, find
        self._began = clock()
        self._seen: dict[int, float] = {}

    def is_gone(self, rank: int) -> bool:
        """Whether the process has certainly ended, or has been missing for so long that it will never come."""
        if self._group is None:
            return False
        name, same = self._group
        if self._find(os.fsencode(f"{name}={rank}"), *same):
            self._seen[rank] = self._clock()
            return False
        seen = self._seen.get(rank)
        return self._clock() - (self._began if seen is None else seen) > (
            _LATE_SECONDS if seen is None else _GONE_SECONDS
        )


def _group(started_with: Mapping[str, str]) -> tuple[str, list[bytes]] | None:
    """The variable with a rank's number, and those that its group has in common; None where it may be anywhere."""
    if "TORCHELASTIC_RUN_ID" in started_with:
        return None
    for name, common, here, all_of_them in _STARTERS:
        if name in started_with and all(one in started_with for one in (*common, here, all_of_them)):
            if started_with[here] != started_with[all_of_them]:
                return None
            return name, [os.fsencode(f"{one}={started_with[one]}") for one in common]
    return None


_STARTERS = (
    ("RANK", ("MASTER_ADDR", "MASTER_PORT"), "LOCAL_WORLD_SIZE", "WORLD_SIZE"),
    ("SLURM_PROCID", ("SLURM_JOB_ID", "SLURM_STEP_ID"), "SLURM_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"),
)


def _own_environment() -> dict[str, str]:
    """The environment with which this program was started. Others cannot see what was set later."""
    with open("/proc/self/environ", "rb") as file:
        pairs = (os.fsdecode(pair).partition("=") for pair in file.read().split(b"\0"))
        return {name: value for name, _, value in pairs}
