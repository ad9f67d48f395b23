"""Beside a run that learns from what servers sample: the process that asks them (`capstan rollout`), kept alive as long as the ranks are at work."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from trainer.config import Config
from trainer.config.objective import OWN
from trainer.processes import children
from trainer.run import layout
from trainer.run.background import Harmless
from trainer.run.records import generations
from trainer.run.segments import Appender
from trainer.store.store import Store
from trainer.tuning.objective.objective import find_objective
from trainer.tuning.objective.rollouts import LearnsFromRollouts

AGAIN_SECONDS = 15.0
"""Until it is started again: a server may be starting, or a run that was finished goes on."""


def asks_servers(config: Config) -> str | None:
    """A sentence about the process that asks the servers of the run; None where the run asks none."""
    if not isinstance(find_objective(config), LearnsFromRollouts) or config.rollout.engine == OWN:
        return None
    servers = ", ".join(config.rollout.engine)
    return f"beside the ranks, where the run is driven: capstan rollout, which has {servers} sample, and is started again when it dies"


@contextmanager
def sampling_beside(config: Config, run: Store, log: Callable[[str], None]) -> Iterator[None]:
    """Inside, a run that learns from what servers sample has a process that asks them; what it says is in the run's folder, and `log` gets
    how it ended where that is news."""
    if asks_servers(config) is None:
        yield
        return
    sampling = _Sampling(run, log)
    # The process dies with the thread that starts it.
    thread = threading.Thread(target=sampling.keep, name="sampling", daemon=True)
    thread.start()
    try:
        yield
    finally:
        sampling.end()
        thread.join()


class _Sampling:
    def __init__(self, run: Store, log: Callable[[str], None]) -> None:
        self._run, self._log, self._over = run, log, threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()

    def keep(self) -> None:
        """Have the process, start it again when it ends, and keep what it says, until the end."""
        said = Appender(self._run, layout.sampling_log(max(generations(self._run), default=0) + 1))
        harmless, told = Harmless("keeping what `capstan rollout` says"), ""
        while (process := self._started()) is not None:
            assert process.stderr is not None
            last = b""
            for line in process.stderr:
                last = line
                said.append(line)
                harmless(said.flush)
            how = f"capstan rollout ended with exit code {process.wait()}: {last.decode(errors='replace').strip()}"
            if process.returncode and how != told and not self._over.is_set():
                told = how
                self._log(f"{how}; it is started again every {AGAIN_SECONDS:g} s")
            self._over.wait(AGAIN_SECONDS)
        harmless(said.close)

    def end(self) -> None:
        with self._starting:
            self._over.set()
        if self._process is not None:
            self._process.kill()

    def _started(self) -> "subprocess.Popen[bytes] | None":
        command = [sys.executable, "-m", "launcher.cli", "rollout", self._run.uri]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        with self._starting:
            if self._over.is_set():
                return None
            # It is no rank of the group that torchrun or srun may have made of this process.
            group = {name for name in os.environ if name in children.OF_A_RANK or name.startswith("SLURM_")}
            environment = {name: value for name, value in os.environ.items() if name not in group}
            self._process = children.start(command, env=environment, **quiet)
            return self._process
