"""The server of tests/ray/forked_worker.py, forked from the one of tests/forked.py. Ray is imported by each worker: its
libraries in C++ read the worker's environment then."""

import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.forked import server

_START_SECONDS = 300.0


class Workers(NamedTuple):
    """The file that a Ray takes for its setup_worker.py, so that its workers are forked, and the process that does."""

    setup_worker: str
    pid: int


@contextmanager
def forked_workers() -> Iterator[Workers]:
    """Fork the workers of a Ray of the body."""
    with tempfile.TemporaryDirectory(prefix="capstan-workers-") as folder:
        address, setup_worker = Path(folder, "socket"), Path(folder, "forked_worker.py")
        setup_worker.symlink_to(Path(__file__).with_name("forked_worker.py"))
        process = server().Process(target=_serve, args=(str(address),), daemon=True)
        process.start()
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not address.exists():
                assert process.exitcode is None, "the server of Ray's workers ended"
                assert time.monotonic() < deadline, "the server of Ray's workers did not start"
                time.sleep(0.05)
            assert process.pid is not None
            yield Workers(str(setup_worker), process.pid)
        finally:
            process.kill()
            process.join()


def _serve(address: str) -> None:
    """Fork a worker for each connection, until this is killed."""
    from trainer.processes.children import end_with_parent

    end_with_parent()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen(64)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _become_worker(connection)
            connection.close()


def _become_worker(connection: socket.socket) -> None:
    """In the new process: Ray's program with the arguments, streams, folder and environment of the process that asked
    for it.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(connection, 8, 2)
    with connection.makefile("rb") as sent:
        start = json.loads(sent.read(int.from_bytes(size, "big")))
    for number, stream in zip((1, 2), streams, strict=True):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(start["folder"])
    os.environ.clear()
    os.environ.update(start["environment"])
    threading.Thread(target=_end_with, args=(connection,), daemon=True).start()
    sys.argv = start["arguments"]
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    finally:
        # Without what Python does at an end: it would take operators of PyTorch's from a rank that still trains.
        os._exit(code)


def _end_with(connection: socket.socket) -> None:
    """End with the process that Ray has started, which waits for us."""
    connection.recv(1)
    os._exit(1)
