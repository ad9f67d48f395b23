"""The sidecars of a run that learns from what servers sample: processes beside its ranks.

They are `capstan rollout`, which asks the servers, and with rollout.engine: serve also the servers. Each is a command.
It is placed on this machine, by cluster/ray/sidecars.py as an actor of Ray, or by slurm/run.sh as a task of srun:

    python -m launcher.start.sidecars RUN_URI NAME ADDRESS

The command keeps its process alive, says on stdout what becomes of it, a line each, and ends with it at SIGTERM.
ADDRESS is the address of its machine, as the others reach it. Once a server answers, its URL is in the run's folder,
for `capstan rollout`.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from typing import NamedTuple, Protocol

from launcher.start.local_ranks import gpus_of_server
from trainer.base.find.locate import resolve_base
from trainer.config import Config
from trainer.config.objective import OWN, SERVE
from trainer.data.dataset.chapters import give_up
from trainer.errors import CapstanError, ConfigError, DataError, StorageError, counted
from trainer.processes import children
from trainer.processes.devices import visible_gpus
from trainer.run import layout
from trainer.run.background import Harmless
from trainer.run.folder import submitted_config
from trainer.run.records import generations
from trainer.run.segments import Appender
from trainer.servers import VLLM_RANKS, is_healthy
from trainer.store.store import Store, open_run_store, open_store
from trainer.tuning.objective import find_objective
from trainer.tuning.objective.rollouts import LearnsFromRollouts

_SERVER_LOOK_SECONDS = 1.0
_SAY_SECONDS = 60.0
_SERVER_END_SECONDS = 10.0
_DEATHS = 3
"""So many times in a row a server may die before it has answered for `_WELL_SECONDS`; then something is wrong that
another start does not mend.
"""
_WELL_SECONDS = 600.0
_LONGEST_WORDS = 600
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
AGAIN_SECONDS = 15.0
"""Until `capstan rollout` is started again: a server may be starting, or a run that was finished goes on."""
_ASKING = "rollout"
_PLACED_AGAIN_SECONDS = 5.0
_END_SECONDS = 30.0
_LOOK_SECONDS = 0.5


class Sidecar(NamedTuple):
    """A process beside the ranks, by its name, and its GPUs. One that `is_near` has the driver's folder and machine."""

    name: str
    gpus: int
    is_near: bool

    def command(self, run: str, address: str) -> list[str]:
        return [sys.executable, "-m", "launcher.start.sidecars", run, self.name, address]


def sidecars_of(config: Config, *, servers: bool = True) -> list[Sidecar]:
    """Return all sidecars of the run, or those without the `servers`; none if it asks no servers.

    The reward is a function of the folder that the run was started in.
    """
    if not isinstance(find_objective(config), LearnsFromRollouts) or config.rollout.engine == OWN:
        return []
    serve = config.rollout.serve
    count = serve.replicas if config.rollout.engine == SERVE and servers else 0
    first = [Sidecar(server_name(number), serve.gpus, is_near=False) for number in range(count)]
    return [*first, Sidecar(_ASKING, 0, is_near=True)]


def server_name(number: int) -> str:
    """Return the name of the server of this number, from 0."""
    return f"server-{number + 1}"


def sidecars_sentence(config: Config) -> str | None:
    """Return a sentence about the sidecars, for the person who submits the run."""
    if not sidecars_of(config):
        return None
    engine, serve = config.rollout.engine, config.rollout.serve
    again = "and is started again when it dies"
    if engine != SERVE:
        return (
            f"beside the ranks, where the run is driven: capstan rollout, which has {', '.join(engine)} sample, {again}"
        )
    gpus = counted(serve.gpus, "GPU") if serve.gpus else "CPUs"
    return (
        f"beside the ranks: {counted(serve.replicas, 'server')} ({shlex.join(serve.command)}) on"
        f" {gpus}{' each' if serve.replicas > 1 else ''}, and capstan rollout, which has them sample; each ends with"
        f" the run, {again}"
    )


class Placed(Protocol):
    """A process beside the ranks that was placed somewhere."""

    def words(self) -> Iterator[str]:
        """Yield the lines that it prints, until it ends as it should. Raises `CapstanError` if it is lost."""
        ...

    def end(self) -> None:
        """End it within seconds."""
        ...


@contextmanager
def sidecars_alive(
    every: Sequence[Sidecar], run: Store, place: Callable[[Sidecar], Placed], log: Callable[[str], None]
) -> Iterator[None]:
    """Inside, the run has these processes beside its ranks. `log` gets what they print.

    `place` places them, and places them again if they are lost.
    """
    if len(every) > 1:
        forget_servers(run)
    tended = [_Tended(one, place, log) for one in every]
    # A command dies with the thread that starts it.
    threads = [threading.Thread(target=one.tend, name="sidecar", daemon=True) for one in tended]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for one in tended:
            one.end()
        for thread in threads:
            thread.join(_END_SECONDS)


def forget_servers(run: Store) -> None:
    """Forget the servers of a start that was killed."""
    for entry in run.list(layout.SERVERS):
        run.delete(entry.key)


class _Tended:
    def __init__(self, one: Sidecar, place: Callable[[Sidecar], Placed], log: Callable[[str], None]) -> None:
        self._one, self._place, self._log = one, place, log
        self._over, self._placing = threading.Event(), threading.Lock()
        self._placed: Placed | None = None

    def tend(self) -> None:
        while True:
            with self._placing:  # so that `end` ends what is placed, or nothing is placed after it
                if self._over.is_set():
                    return
                self._placed = placed = self._place(self._one)
            try:
                for line in placed.words():
                    self._log(line)
                return
            except CapstanError as error:
                if not self._over.is_set():
                    self._log(f"{self._one.name}: {error}; it is started again")
            self._over.wait(_PLACED_AGAIN_SECONDS)

    def end(self) -> None:
        with self._placing:
            self._over.set()
        if self._placed is not None:
            self._placed.end()


def sidecars_here(
    config: Config, run: Store, log: Callable[[str], None], *, servers: bool = True
) -> AbstractContextManager[None]:
    """Run `sidecars_alive` on this machine, whose last GPUs are the servers'."""
    every = sidecars_of(config, servers=servers)

    def place(one: Sidecar) -> Placed:
        devices = {}
        if config.rollout.serving_gpus:
            devices["CUDA_VISIBLE_DEVICES"] = gpus_of_server(every.index(one), one.gpus, visible_gpus())
        return Child(one.command(run.uri, "127.0.0.1"), devices)

    return sidecars_alive(every, run, place, log)


class Child:
    """A process beside the ranks as a child of this one. It dies with the thread that makes this object."""

    def __init__(self, command: list[str], variables: dict[str, str], folder: str | None = None) -> None:
        # It is no rank of the group that torchrun or srun may have made this process a part of.
        group = {name for name in os.environ if name in children.OF_A_RANK or name.startswith("SLURM_")}
        # It has a session of its own, so the driver ends it, and not Ctrl-C.
        self._process: subprocess.Popen[str] = children.start(
            command,
            env={name: value for name, value in os.environ.items() if name not in group} | variables,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def words(self) -> Iterator[str]:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # no `yield from`: Ray sends values in
            yield line.rstrip()
        if self._process.wait():
            raise CapstanError(f"the process that keeps it ended with exit code {self._process.returncode}")

    def end(self) -> None:
        self._process.terminate()


def _keep_asking(run: Store, over: threading.Event, tell: Callable[[str], None]) -> None:
    """Keep `capstan rollout` running, and report how it ended if that is news."""
    told = ""
    with closing(Program(run, _ASKING)) as program:
        while not over.is_set():
            with program.running(
                # Whoever started the run has said that it may run its code.
                children.apart([sys.executable, "-m", "launcher.cli", "rollout", run.uri, "--trust-run"]),
                dict(os.environ),
            ) as process:
                while process.poll() is None and not over.wait(_LOOK_SECONDS):
                    program.keep()
            how = f"capstan rollout ended with exit code {process.returncode}: {program.last_words(1)}"
            if process.returncode and how != told and not over.is_set():
                told = how
                tell(f"{how}; it is started again every {AGAIN_SECONDS:g} s")
            over.wait(AGAIN_SECONDS)


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
        with children.family(command, _SERVER_END_SECONDS, env=environment, **pipes) as process:
            hearing = threading.Thread(target=self._hear, args=(process,), daemon=True)
            hearing.start()
            try:
                yield process
            finally:
                if process.poll() is not None:
                    hearing.join(_SERVER_LOOK_SECONDS)  # its last words
        hearing.join(_SERVER_LOOK_SECONDS)
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
    while process.poll() is None and not over.wait(_SERVER_LOOK_SECONDS):
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
    raise ConfigError(
        f"rollout.serve: a server cannot listen at {address}, which this machine's name resolves to. Correct the name's"
        " address in the machine's network settings (/etc/hosts, DNS)."
    )


def main(uri: str, name: str, address: str) -> None:
    over = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    run = open_store(uri)

    def tell(line: str) -> None:
        with suppress(OSError):  # nobody listens any more, and the end is near
            print(line, flush=True)

    if name == _ASKING:
        _keep_asking(run, over, tell)
        return
    try:
        keep_server(submitted_config(run), run, name, address, over, tell)
    except CapstanError as error:
        tell(f"{error} The run commits and ends.")
        while not over.is_set():  # however long the store cannot be reached
            with suppress(StorageError):
                give_up(run, error)
                return
            over.wait(_PLACED_AGAIN_SECONDS)


if __name__ == "__main__":
    main(*sys.argv[1:])
