"""The adapter beside each commit (`checkpoint.adapters`), where common tools look for `adapter_model.safetensors`.

Rank 0 has a process of its own export the adapter, so the training loses no step to it: a thread would hold Python's
lock while it copies gigabytes. After each commit and at each start, every missing adapter is written, the newest first.
So an adapter whose writing failed, or was killed, is written later. No commit depends on it.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from trainer.base.find.small_files import TOKENIZER_PATTERNS
from trainer.export.destination import holds_export
from trainer.plan.resolve import Resolved
from trainer.processes import children
from trainer.run import layout
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.store import Store


class AdapterWriter:
    """Writes the adapters that a run's commits lack.

    `log` gets a line about each. `half` are the names of a half export.
    """

    def __init__(self, folder: Store, half: Collection[str], log: Callable[[str], None]) -> None:
        self._run, self._half, self._log = folder, half, log
        self._pool = ThreadPoolExecutor(1, "adapters")
        self._next: Future[None] | None = None
        self._process: subprocess.Popen[str] | None = None
        self._stopping = threading.Event()

    def write(self) -> None:
        """Begin to write what is missing. Returns at once."""
        waits = self._next and not (self._next.running() or self._next.done())
        if not waits:  # a pass that has not begun will see this commit too
            self._next = self._pool.submit(self._write_missing)

    def close(self, *, wait: bool) -> None:
        """Wait until all are written, or leave the rest to the next start."""
        if not wait:
            self._stopping.set()
            if self._process is not None:
                self._process.kill()
        self._pool.shutdown(cancel_futures=not wait)

    def _write_missing(self) -> None:
        try:
            for step in committed_steps(self._run):
                if not self._stopping.is_set() and not holds_export(self._run.sub(layout.adapter(step)), *self._half):
                    self._export(step)
        except Exception as error:  # nothing here may end the training
            self._failed("the adapters beside the checkpoints", error)

    def _export(self, step: int) -> None:
        started, destination = time.monotonic(), f"{self._run.uri}/{layout.adapter(step)}"
        command = [sys.executable, "-m", "trainer.export", self._run.uri, destination]
        # The process uses one thread of the host's CPU, and the code of this process.
        apart = {
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        with children.start(
            [*command, "--format", "peft", "--step", str(step)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **apart},
        ) as self._process:
            if self._stopping.is_set():  # the request to stop came before there was a process to kill
                self._process.kill()
            _, said = self._process.communicate()
        if self._stopping.is_set():
            return
        if self._process.returncode:
            self._failed(f"the adapter of step {step}", said.rpartition("capstan: ")[2].strip() or "it was killed")
        else:
            self._log(f"adapter of step {step} written beside its checkpoint in {time.monotonic() - started:.1f} s")

    def _failed(self, what: str, reason: object) -> None:
        self._log(f"{what} could not be written, which is tried again after the next commit: {reason}")


@contextmanager
def adapters_beside(
    folder: Store, resolved: Resolved, log: Callable[[str], None], *, writes: bool
) -> Iterator[Callable[[], None]]:
    """Yield the function to call after each commit.

    At the end the training waits for the last adapter, unless the run ends by an exception: a machine that is taken
    away waits for nothing.
    """
    if not (writes and resolved.config.checkpoint.adapters):
        yield lambda: None
        return
    writer = AdapterWriter(folder, (*resolved.method.file_names, *TOKENIZER_PATTERNS), log)
    writer.write()
    try:
        yield writer.write
    except BaseException:
        writer.close(wait=False)
        raise
    writer.close(wait=True)
