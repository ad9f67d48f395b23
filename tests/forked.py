"""Processes forked from a server that has imported everything: a start takes tenths of a second instead of seconds.

Commands are forked, and so is every module of ours that such a command starts, also one that a started module starts.
All workers of pytest-xdist share one server (tests/conftest.py).
"""

import atexit
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

_IMPORT_TIMEOUT = 500.0
# Libraries read these when they are imported, which the server does. A rank sets the wait policy before it imports
# PyTorch, and here comes too late with it: where it asks for two threads, those would turn on the processors while they
# wait, which multiplies a step's time.
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "HF_HUB_OFFLINE": "1",
}


def start_server() -> str:
    """The address of the server, which begins to import if it has not begun."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        forkserver.set_forkserver_preload(["tests.prepared"])
        forkserver._forkserver.ensure_running()  # pyright: ignore[reportAttributeAccessIssue]
        return _address()
    finally:
        os.environ.clear()
        os.environ.update(before)


def use_server(address: str) -> None:
    """Have this process's ranks and commands forked from another process's server, which ends with that process."""
    _fork_from(address)
    # Its own server would get this end of a pipe with every request, to know that it is still needed.
    forkserver._forkserver._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)  # pyright: ignore[reportAttributeAccessIssue]


@cache
def server() -> ForkServerContext:
    """The server, once it has imported the training stack, which takes long where files are cold: no process's time
    counts it.
    """
    start_server()
    context = get_context("forkserver")
    process = context.Process(target=os.getpid)
    process.start()
    process.join(_IMPORT_TIMEOUT)
    assert process.exitcode == 0, "the server did not import the training stack"
    return context


_MAIN = "from launcher.cli.__main__ import main; main()"


class _Start(NamedTuple):
    """What a new interpreter would find: its arguments, folder and environment. `before` is code that it runs first,
    and `server` the address of the server that forks it, by which it has others forked."""

    arguments: list[str]
    folder: str
    environment: dict[str, str]
    before: str
    server: str


def run_command(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float, before: str = ""
) -> subprocess.CompletedProcess[str]:
    """`capstan arguments` in `folder`, with the two streams as text.

    The code `before` runs first there and in each module of ours that the command starts. Raises `TimeoutExpired` as
    `subprocess.run` does.
    """
    return _run(["capstan", *arguments], folder, environment, timeout, before, _MAIN)


def run_program(
    file: Path, folder: Path, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """`python file` in `folder`, as `run_command` runs a command."""
    return _run([str(file)], folder, environment, timeout, "", file.read_text(encoding="utf-8"))


def _run(
    arguments: list[str], folder: Path, environment: Mapping[str, str], timeout: float, before: str, program: str
) -> subprocess.CompletedProcess[str]:
    context = server()
    with tempfile.TemporaryDirectory(prefix="capstan-command-") as streams:
        start = _Start(arguments, str(folder), dict(environment), before, _address())
        process = context.Process(target=_command, args=(start, streams, program))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout, *_read(streams))
        return subprocess.CompletedProcess(arguments, process.exitcode, *_read(streams))


def _read(streams: str) -> tuple[str, str]:
    out, err = (Path(streams, name) for name in ("1", "2"))
    return (out.read_text(), err.read_text()) if err.exists() else ("", "")


def _command(start: _Start, streams: str, program: str) -> None:
    """In the new process: the program in the place of this function."""
    files = (f"{streams}/{number}" for number in (1, 2))
    written = [os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for file in files]
    _become(start, [os.open(os.devnull, os.O_RDONLY), *written])
    _end_after(lambda: exec(program, {"__name__": "__main__"}))


class _Streams:
    """Three open files that travel to a forked process."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def __reduce__(self) -> tuple[Any, ...]:
        return _Streams._arrived, ([DupFd(number) for number in self.numbers],)

    @staticmethod
    def _arrived(files: list[Any]) -> "_Streams":
        return _Streams([file.detach() for file in files])


def _module(start: _Start, streams: _Streams, *, session: bool) -> None:
    """In the new process: `python -m` with the arguments, which ends with its parent."""
    from trainer.processes.children import end_with_parent

    if session:
        os.setsid()
    _become(start, streams.numbers)
    end_with_parent()
    module = start.arguments[0]
    for imported in (module, f"{module}.__main__"):  # by the server, which runpy would warn of
        if not hasattr(sys.modules.get(imported), "__path__"):
            sys.modules.pop(imported, None)
    _end_after(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))


def _become(start: _Start, streams: list[int]) -> None:
    os.chdir(start.folder)
    os.environ.clear()
    os.environ.update(start.environment)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv = start.arguments
    _fork_modules_too(start)
    exec(start.before, {})


def _end_after(work: Callable[[], object]) -> None:
    try:
        work()
    finally:
        for module in list(_Forked.running):
            module.kill()  # it would end with this process, which multiprocessing has wait for it
        # As an interpreter ends: pools end their processes, for which multiprocessing would wait without telling them.
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()  # multiprocessing ends its processes without
        sys.stdout.flush()


def _address() -> str:
    return forkserver._forkserver._forkserver_address  # pyright: ignore[reportAttributeAccessIssue]


def _fork_from(address: str) -> None:
    forkserver._forkserver._forkserver_address = address  # pyright: ignore[reportAttributeAccessIssue]
    forkserver._forkserver.ensure_running = lambda: None  # pyright: ignore[reportAttributeAccessIssue]


def _fork_modules_too(start: _Start) -> None:
    """A process that has used the store has threads, which a fork of it would lack: what this process starts is forked
    from the server, not from here."""
    _fork_from(start.server)
    fork_modules(setattr, start.before)


def fork_modules(replace: Callable[[Any, str, Any], None], before: str = "") -> None:
    """Have the modules and the sides of proofs that this process starts forked from the server, which runs already.

    `replace` sets attributes, as `setattr` does.
    """
    from trainer.export.proof import sides
    from trainer.processes import children

    def tied(command: Sequence[str], real: Callable[..., Any], ours: Callable[..., Any], **options: Any) -> Any:
        if list(command[:2]) == [sys.executable, "-m"]:
            return ours(command, before=before, **options)
        return real(command, **options)

    replace(children, "start", partial(tied, real=children.start, ours=_Forked))
    replace(children, "run", partial(tied, real=children.run, ours=run_module))
    replace(sides, "ProcessPoolExecutor", _side_pool)


def _side_pool(workers: int, *, initargs: tuple[str], **_: Any) -> ProcessPoolExecutor:
    given = (dict(os.environ), *initargs)
    return ProcessPoolExecutor(workers, get_context("forkserver"), initializer=_become_side, initargs=given)


def _become_side(environment: dict[str, str], device: Any) -> None:
    from trainer.export.proof.sides import _alone

    os.environ.clear()
    os.environ.update(environment)
    _alone(device)


def forked_module(command: Sequence[str], *, before: str, **options: Any) -> subprocess.Popen[Any]:
    """`subprocess.Popen` of `python -m module`, forked from the server, which runs already."""
    return _Forked(command, before=before, **options)


def run_module(
    command: Sequence[str], *, before: str = "", timeout: float | None = None, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[Any]:
    """`subprocess.run` of `python -m module` in a process forked from the server, which runs already."""
    if options.pop("capture_output", False):
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    given = options.pop("input", None)
    if given is not None:
        options["stdin"] = subprocess.PIPE
    with _Forked(command, before=before, **options) as process:
        try:
            said = process.communicate(given, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(list(command), process.returncode, *said)
    if check:
        done.check_returncode()
    return done


def start_module(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], output: IO[bytes], before: str = ""
) -> subprocess.Popen[Any]:
    """`python -m arguments` in `folder`, as a process to signal and wait for; both streams go to `output`.

    What it starts itself is forked as well, and does not end with it where it is killed.
    """
    server()
    streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
    return _Forked([sys.executable, "-m", *arguments], before=before, cwd=folder, env=environment, **streams)


class _Forked(subprocess.Popen[Any]):
    """`python -m module` whose process is forked from the server; pipes, waits and signals are those of subprocess."""

    running: ClassVar[set["_Forked"]] = set()
    """Those that this process has started and not seen end."""

    def __init__(self, command: Sequence[str], *, before: str, **options: Any) -> None:
        self._before = before
        super().__init__(command, **options)

    def _execute_child(self, args: list[str], *rest: Any) -> None:
        # Those of subprocess, in its order: folder and environment, the six ends of the pipes, and start_new_session.
        folder, environment, (read, _, _, out, _, error), session = rest[4], rest[5], rest[9:15], rest[20]
        streams = [own if given == -1 else given for own, given in enumerate((read, out, error))]
        start = _Start(args[2:], str(folder or os.getcwd()), dict(environment or os.environ), self._before, _address())
        context = get_context("forkserver")
        self._process = context.Process(target=_module, args=(start, _Streams(streams)), kwargs={"session": session})
        self._process.start()
        self.pid: int = self._process.pid or 0
        self._child_created = True
        self.running.add(self)
        self._close_pipe_fds(*rest[9:15])  # pyright: ignore[reportAttributeAccessIssue]

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        return self._end(0)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        code = self._end(0 if wait_flags else None)
        return (0, 0) if code is None else (self.pid, code << 8 if code >= 0 else -code)  # as waitpid tells it

    def _end(self, patience: float | None) -> int | None:
        if self.returncode is None:
            self._process.join(patience)
            self.returncode = self._process.exitcode
            if self.returncode is not None:
                self.running.discard(self)
        return self.returncode
