"""A server of a run with rollout.engine: serve, kept alive beside its ranks.

Once it answers, its URL is in the run's folder, for `capstan rollout`.
"""

import os
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress

from trainer.base.find.locate import resolve_base
from trainer.config import Config
from trainer.errors import CapstanError, ConfigError, DataError
from trainer.processes import children
from trainer.run import layout
from trainer.run.background import Harmless
from trainer.run.records import generations
from trainer.run.segments import Appender
from trainer.servers.accepted import VLLM_RANKS
from trainer.servers.completions import is_healthy
from trainer.store.store import Store, open_run_store

_LOOK_SECONDS = 1.0
_SAY_SECONDS = 60.0
_END_SECONDS = 10.0
_DEATHS = 3
"""So many times in a row a server may die before it has answered for `_WELL_SECONDS`; then something is wrong that
another start does not mend.
"""
_WELL_SECONDS = 600.0
_LONGEST_WORDS = 600
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class Program:
    """A program beside the ranks. Its output is kept in the run's folder under its name."""

    def __init__(self, run: Store, name: str) -> None:
        self._log = Appender(run, layout.sidecar_log(max(generations(run), default=0) + 1, name))
        self._harmless = Harmless(f"keeping what {name} says")
        self._last = deque[str](maxlen=10)

    def close(self) -> None:
        self._harmless(self._log.close)

    @contextmanager
    def running(self, command: Sequence[str], environment: dict[str, str]) -> Iterator["subprocess.Popen[bytes]"]:
        """Run the command. Its process ends with the body, with everything that it has started.

        Raises `OSError` if it does not start.
        """
        self._last.clear()
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        with children.family(command, _END_SECONDS, env=environment, **pipes) as process:
            hearing = threading.Thread(target=self._hear, args=(process,), daemon=True)
            hearing.start()
            try:
                yield process
            finally:
                if process.poll() is not None:
                    hearing.join(_LOOK_SECONDS)  # its last words
        hearing.join(_LOOK_SECONDS)
        self.keep()

    def _hear(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self._log.append(line)
            if said := line.decode(errors="replace").strip():
                self._last.append(said)

    def keep(self) -> None:
        """Store everything that the program has printed in the run's folder."""
        self._harmless(self._log.flush)

    def last_words(self, lines: int) -> str:
        return " | ".join(list(self._last)[-lines:])[-_LONGEST_WORDS:] or "it said nothing"


def keep_server(
    config: Config, run: Store, name: str, address: str, over: threading.Event, tell: Callable[[str], None]
) -> None:
    """Keep the server running until it is `over`, and restart it when it dies. `tell` gets what becomes of it.

    Raises:
        ConfigError: its program is not there, or it does not answer in time.
        DataError: it dies again and again.
    """
    deaths, port = 0, 0
    run.delete(layout.server(name))  # the key of a keeper that was killed
    positions, longest = resolve_base(config.model).architecture.positions, config.data.sequence_length
    longest = min(positions or longest, longest)  # of a prompt with its answer, in tokens
    with closing(Program(run, name)) as program:
        while not over.is_set():
            port = _free_port(address, port)
            command = server_command(config, address, port, longest)
            url = f"http://{f'[{address}]' if ':' in address else address}:{port}"
            began = time.monotonic()
            try:
                with program.running(command, _environment(config)) as process:
                    tell(f"{name}: {' '.join(command[:2])} starts on {socket.gethostname()}, {_devices()}")
                    _watch(config, run, name, url, program, process, over, tell)
            except OSError as error:
                raise ConfigError(
                    f"rollout.serve.command: {command[0]!r} does not start on {socket.gethostname()}"
                    f" ({error.strerror or error}). Install vLLM there, or give the program by its path:"
                    " [/opt/vllm/bin/vllm, serve]."
                ) from error
            finally:
                with suppress(CapstanError):
                    run.delete(layout.server(name))
            if over.is_set():
                return
            deaths = 1 if time.monotonic() - began > _WELL_SECONDS else deaths + 1
            how = f"{name} ended with exit code {process.returncode}: {program.last_words(3)}"
            if deaths == _DEATHS:
                raise DataError(
                    f"rollout.serve: {how}. It has died {_DEATHS} times in a row; its log is in logs/ of the run's"
                    " folder."
                )
            tell(f"{how}; it is started again")


def _watch(
    config: Config,
    run: Store,
    name: str,
    url: str,
    program: Program,
    process: "subprocess.Popen[bytes]",
    over: threading.Event,
    tell: Callable[[str], None],
) -> None:
    """Return when the server has died, has been silent for too long after it had answered, or is `over`.

    Raises:
        ConfigError: it never answered in time.
    """
    began = told = heard = time.monotonic()
    answers, patience = False, config.rollout.serve.start_seconds
    while process.poll() is None and not over.wait(_LOOK_SECONDS):
        program.keep()
        now = time.monotonic()
        if is_healthy(url):
            if not answers:
                run.put(layout.server(name), url.encode())
                tell(f"{name} answers at {url}, {now - began:.0f} s after its start")
            answers, heard = True, now
        elif now - heard > patience and not answers:
            raise ConfigError(
                f"rollout.serve.start_seconds: {name} has not answered {url}/health within {patience:g} s; it said"
                f" last: {program.last_words(3)}. Raise it, or see the server's log in logs/ of the run's folder."
            )
        elif now - heard > patience:
            tell(f"{name} has been silent for {patience:g} s, and is killed")
            return
        elif now - told > _SAY_SECONDS and not answers:
            told = now
            tell(
                f"{name} does not answer yet, {now - began:.0f} s after its start; it said last:"
                f" {program.last_words(1)}"
            )


def server_command(config: Config, address: str, port: int, longest: int) -> list[str]:
    """Return the command of a server at HOST:PORT, for texts of up to so many tokens."""
    serve = config.rollout.serve
    base = serve.base or config.model.base
    revision = [f"--revision={config.model.revision}"] if config.model.revision and not serve.base else []
    rank = max(config.tuning.rank, config.tuning.experts_rank or 0)
    return [
        *serve.command,
        base,
        *revision,
        f"--host={address}",
        f"--port={port}",
        "--served-model-name=base",
        f"--dtype={_DTYPES.get(config.model.dtype, 'auto')}",
        f"--max-model-len={longest}",
        "--enable-lora",
        "--max-loras=2",
        f"--max-lora-rank={next((size for size in VLLM_RANKS if size >= rank), rank)}",
        *([f"--tensor-parallel-size={serve.gpus}"] if serve.gpus > 1 else []),
        *serve.options,
    ]


def _environment(config: Config) -> dict[str, str]:
    program = config.rollout.serve.command[0]
    path = os.environ.get("PATH", os.defpath)
    return {
        **os.environ,
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "CAPSTAN_STORE": open_run_store(config).uri,
        # Its environment may have other programs that it starts, such as ninja.
        **({"PATH": f"{os.path.dirname(program)}{os.pathsep}{path}"} if "/" in program else {}),
    }


def _devices() -> str:
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "on all of its GPUs" if devices is None else f"on GPU {devices}" if devices else "on CPUs"


def _free_port(address: str, wanted: int) -> int:
    """Return a port that nobody has. It is `wanted`, which `capstan rollout` asks already, if that is free."""
    for port in (wanted, 0):
        with (
            suppress(OSError),
            socket.create_server(
                (address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET
            ) as probe,
        ):
            return probe.getsockname()[1]
    raise ConfigError(f"rollout.serve: no port is free at {address}. Look for its name in the machine's network.")
