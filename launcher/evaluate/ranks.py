"""Ranks on this machine that evaluate a run or answer prompts.

There is one rank for each GPU, or on the CPU as many as the settings say.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from typing import IO, Any

from launcher.start.group import is_rank, slurm_rank
from launcher.start.local_ranks import count_ranks, end_together, places
from launcher.view.terminal import put
from trainer.config import Config, override
from trainer.errors import CapstanError, ConfigError
from trainer.evaluate.program import Ask, answer
from trainer.evaluate.prompts import Prompt
from trainer.processes import children
from trainer.processes.helper_thread import helper_thread

Hear = Callable[[dict[str, Any]], None]

_MODULE = "trainer.evaluate.program"
_AWAKE_SECONDS = 300.0


def run_ranks(ask: Ask, config: Config, prompts: Iterable[list[Prompt]], hear: Hear) -> dict[str, Any]:
    """Do as asked, and return the result.

    This process does it as one rank of torchrun's or srun's group, or it starts ranks of its own.

    `prompts` are taken one list at a time, each when the answers to the one before are there. `hear` gets what rank 0
    tells.

    Raises:
        CapstanError: the ranks', with its exit code.
    """
    ask = replace(ask, on_cpu=config.cluster.gpus_per_worker == 0)
    os.environ.update(slurm_rank(os.environ))
    if is_rank():
        return answer(ask, prompts, hear)
    with _started(ask, count_ranks(config)) as (process, said):
        result = _conversed(process, iter(prompts), hear)
        _hand_over(process.stdin, None)
        process.wait()
    if result is None:
        put(said(), file=sys.stderr)
        raise CapstanError(f"the ranks ended with exit code {process.returncode}; their output is above.")
    if "error" in result:
        error = CapstanError(result["error"])
        error.exit_code = result["exit_code"]
        raise error
    return result["result"]


def for_server(config: Config, setting: str, verb: str) -> Config:
    """Return `config` for the one process that asks a server, which needs no GPU.

    Raises `ConfigError` if torchrun or srun has started several processes.
    """
    if is_rank():
        raise ConfigError(f"{setting}: one process asks a server. Call capstan {verb} without torchrun or srun.")
    return override(config, "cluster.workers=1", "cluster.gpus_per_worker=0")


@contextmanager
def _started(ask: Ask, ranks: int) -> Iterator[tuple["subprocess.Popen[str]", Callable[[], str]]]:
    """Start the process of rank 0. Yields it, and a function that returns all ranks' stderr once they have ended."""
    command = [sys.executable, "-m", _MODULE, ask.to_json()]
    said = list[str]()
    with tempfile.TemporaryFile("w+") as errors:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        silent: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        processes = [
            children.start(
                command, env={**os.environ, **place}, stderr=errors, text=True, **(silent if rank else pipes)
            )
            for rank, place in enumerate(places(ranks))
        ]
        watch = threading.Thread(target=end_together, args=(processes,), daemon=True)
        watch.start()
        try:
            yield processes[0], lambda: said[0]
        except BaseException:  # Ctrl-C, or nobody reads any more
            for process in processes:
                process.kill()
            raise
        finally:
            watch.join()  # the ranks still write to the file until they have ended
            errors.seek(0)
            said.append(errors.read())
            for pipe in filter(None, (processes[0].stdin, processes[0].stdout)):
                with suppress(BrokenPipeError):
                    pipe.close()


def _conversed(process: "subprocess.Popen[str]", prompts: Iterator[list[Prompt]], hear: Hear) -> dict[str, Any] | None:
    """Hand over prompts as they are wanted and hear what is told, up to the last line; None if it never came."""
    assert process.stdin
    assert process.stdout
    for line in process.stdout:
        told = json.loads(line)
        if "result" in told or "error" in told:
            return told
        hear(told)
        if "ready" in told or "answers" in told:
            with _kept_awake(process.stdin):
                given = next(prompts, None)
            _hand_over(process.stdin, given)
    return None


def _kept_awake(pipe: IO[str]) -> AbstractContextManager[None]:
    """While a person thinks, send the ranks an empty list every few minutes: their group would not wait for an hour."""

    def keep(done: threading.Event) -> None:
        while not done.wait(_AWAKE_SECONDS):
            _hand_over(pipe, [])

    return helper_thread(keep, "awake")


def _hand_over(pipe: IO[str] | None, prompts: list[Prompt] | None) -> None:
    """Write `prompts` to the pipe; None closes it.

    Ranks that have ended meanwhile are no error here, because their output says why.
    """
    assert pipe
    try:
        if prompts is None:
            pipe.close()
        elif not pipe.closed:
            print(json.dumps(prompts), file=pipe, flush=True)
    except BrokenPipeError:
        with suppress(BrokenPipeError):  # closing tries once more to write the rest
            pipe.close()
