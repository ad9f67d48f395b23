"""Processes forked from a server that has imported everything: a start takes tenths of a second instead of seconds."""

import atexit
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path

_IMPORT_TIMEOUT = 300.0
# Libraries read these when they are imported, which the server does.
ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@cache
def server() -> ForkServerContext:
    """The server, once it has imported the training stack, which takes long where files are cold: no process's time counts it."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        context = get_context("forkserver")
        context.set_forkserver_preload(["tests.prepared"])
        process = context.Process(target=os.getpid)
        process.start()
        process.join(_IMPORT_TIMEOUT)
        assert process.exitcode == 0, "the server did not import the training stack"
        return context
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_command(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """`capstan arguments` in `folder`, with the two streams as text. Raises `TimeoutExpired` as `subprocess.run` does."""
    with tempfile.TemporaryDirectory(prefix="capstan-command-") as streams:
        process = server().Process(target=_command, args=(list(arguments), str(folder), dict(environment), streams))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(["capstan", *arguments], timeout, *_read(streams))
        return subprocess.CompletedProcess(["capstan", *arguments], process.exitcode, *_read(streams))


def _read(streams: str) -> tuple[str, str]:
    out, err = (Path(streams, name) for name in ("1", "2"))
    return (out.read_text(), err.read_text()) if err.exists() else ("", "")


def _command(arguments: list[str], folder: str, environment: dict[str, str], streams: str) -> None:
    """In the new process: what `python -m launcher.cli` would find, then its main function."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2):
        os.dup2(os.open(f"{streams}/{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    sys.argv = ["capstan", *arguments]
    from launcher.cli.__main__ import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its processes without
