"""The ranks of a run on this machine alone: processes beside the driver, and the servers beside them.

Ray is not used, because its start would take longer than many a small run. The program of a rank is

    python -m launcher.start.local_ranks TASK OUTCOME

The file TASK is JSON: the configuration, the compiled data, whether there must be a checkpoint, and when the start
began. The rank writes how it ended to the file OUTCOME, as `outcome_of` does. A killed process writes none.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from launcher.policy import retry
from launcher.start.attempts import Attempts, Watch, keep_trying
from launcher.start.group import imported_rank
from launcher.start.keeper import Forked, ForkedHere, Keeper, OwnKeeper, Unprepared
from trainer import errors
from trainer.config import Config, parse_config
from trainer.config.cluster import STARTS_HERE
from trainer.config.objective import SERVE
from trainer.data.compile.prepare import Datasets
from trainer.errors import NOT_JSON, CapstanError, ConfigError
from trainer.processes import children
from trainer.processes.devices import local_gpus, visible_gpus
from trainer.store.scratch import scratch_folder

_LOOPBACK = "127.0.0.1"
_LOOK_SECONDS = 0.1
_LAST_WORDS_SECONDS = 5.0
_KILLED_SECONDS = 0.3
"""The same after a kill, for ranks whose memory is kept: what they did not say is in there. Killed ranks had waited for
one that is gone, and have nothing to tell."""
_WORDS = 300


def count_ranks(config: Config, serving: int = 0) -> int:
    """Return a rank for each GPU of this machine except those that are `serving`, but at most `cluster.workers`.

    Without GPUs it is `cluster.workers`, or one.
    """
    most = config.cluster.most_workers
    gpus = 0 if config.cluster.gpus_per_worker == 0 else local_gpus() - serving
    return min(gpus, most or gpus) if gpus else most or 1


def check_servers_here(config: Config, ranks: int) -> None:
    """Raise `ConfigError` if the run's servers find no program on this machine, or no GPUs beside those of its ranks.

    `ranks` is the number of the run's ranks.
    """
    serve = config.rollout.serve
    if config.rollout.engine != SERVE:
        return
    if shutil.which(serve.command[0]) is None:
        raise ConfigError(
            f"rollout.serve.command: {serve.command[0]!r} is not found on {socket.gethostname()}. Install vLLM, or give"
            " the program by its path: [/opt/vllm/bin/vllm, serve]."
        )
    serving, there = config.rollout.serving_gpus, local_gpus()
    training = ranks if config.cluster.gpus_per_worker != 0 and there else 0
    if serving and serving + training > there:
        raise ConfigError(
            f"rollout.serve: {serve.replicas} x {serve.gpus} GPUs for servers and {training} for ranks are more than"
            f" the {there} of {socket.gethostname()}. Lower rollout.serve.replicas, rollout.serve.gpus (0 serves on"
            " CPUs) or cluster.workers."
        )


def gpus_of_server(number: int, each: int, gpus: Sequence[str]) -> str:
    """Return CUDA_VISIBLE_DEVICES of the server of this number, from 0, on a machine with these devices.

    Servers take the last devices, because ranks take the first.
    """
    end = len(gpus) - number * each
    return ",".join(gpus[end - each : end])


def places(ranks: int) -> list[dict[str, str]]:
    """Return the variables that tell each rank its place, as torchrun sets them; none for a single rank."""
    if ranks == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": _LOOPBACK, "MASTER_PORT": port}
    return [
        {name: str(value) for name, value in {**world, "RANK": rank, "LOCAL_RANK": rank}.items()}
        for rank in range(ranks)
    ]


class Process(Protocol):
    """A rank's process, by the part of `subprocess.Popen` that is used here."""

    @property
    def returncode(self) -> int | None: ...
    def poll(self) -> int | None: ...
    def kill(self) -> None: ...
    def wait(self) -> int: ...


def end_together(
    processes: Sequence[Process],
    look: Callable[[], None] = lambda: None,
    *,
    kept: bool = False,
) -> list[int]:
    """Return when all processes have ended. `look` is called meanwhile, and may raise.

    When one fails, the others get a moment for their own messages, a short one if it was killed and their memory is
    `kept`, and are then killed, because they would wait for the failed one. The result has the numbers of the killed
    ones.
    """
    deadline: float | None = None
    while alive := [number for number, process in enumerate(processes) if process.poll() is None]:
        time.sleep(_LOOK_SECONDS)
        look()
        if deadline is None and (codes := [code for process in processes if (code := process.poll())]):
            killed = all(code == -signal.SIGKILL for code in codes)
            deadline = time.monotonic() + (_KILLED_SECONDS if kept and killed else _LAST_WORDS_SECONDS)
        if deadline is not None and time.monotonic() > deadline:
            left = [number for number in alive if processes[number].poll() is None]
            for number in left:
                processes[number].kill()
            for number in left:
                processes[number].wait()
            return left
    return []


def ranks_here(config: Config) -> int | None:
    """Return how many ranks a run that joins no cluster has on this machine.

    None means that it asks for what Ray gives: resources by name, or more GPUs than this machine has, which Ray refuses
    with what is missing. Raises `ConfigError` if there is no room for its servers.
    """
    cluster = config.cluster
    if cluster.ray.address == STARTS_HERE or cluster.ray.resources:
        return None
    check_servers_here(config, cluster.fewest_workers or 1)
    ranks = count_ranks(config, config.rollout.serving_gpus)
    return ranks if ranks >= (cluster.fewest_workers or 1) else None


def run_here(attempts: Attempts, ranks: int, log: Callable[[str], None]) -> None:
    """Train as `ranks` processes beside this one until done or until the budgets are used up.

    Raises what `keep_trying` does.
    """
    with ExitStack() as stack:
        start = _spawned
        if attempts.config.cluster.keeper:
            keeper = stack.enter_context(OwnKeeper(attempts.config.cluster.gpus_per_worker))
            start, attempts.kept = partial(_forked, keeper, log), True
        keep_trying(attempts, lambda: _attempt(attempts, ranks, start, log), log)


def _attempt(attempts: Attempts, ranks: int, start: "_StartRank", log: Callable[[str], None]) -> retry.Failure | None:
    log(f"launch: starts the process{'es' if ranks > 1 else ''} of {ranks} rank{'s' if ranks > 1 else ''}")
    with scratch_folder("start") as folder:
        given = Path(folder, "task.json")
        given.write_text(json.dumps(attempts.task()), encoding="utf-8")
        with _started(given, ranks, attempts.config.rollout.serving_gpus, start) as group:
            killed = end_together([rank.process for rank in group], Watch(attempts).look, kept=attempts.kept)
            ended = {number: rank for number, rank in enumerate(group) if number not in killed}
        failures = {number: error for number, rank in ended.items() if (error := rank.error()) is not None}
        return retry.first_cause(sorted(failures.items(), key=lambda failure: ended[failure[0]].told_at()))


@dataclass(frozen=True)
class _Rank:
    """The process of a rank, with the files of how it ended and of what it has printed."""

    process: Process
    outcome: Path
    said: Path | None = None

    def told_at(self) -> float:
        """The time at which it wrote down how it ended; infinite if it could not."""
        return self.outcome.stat().st_mtime if self.outcome.exists() else float("inf")

    def error(self) -> Exception | None:
        """Why the rank has ended, by what it wrote down; None when it is done."""
        code = self.process.wait()
        try:
            found = json.loads(self.outcome.read_text(encoding="utf-8"))
        except (OSError, *NOT_JSON):
            lines = self.said.read_text(encoding="utf-8", errors="replace").strip().splitlines() if self.said else []
            how = (
                f"its process was killed by signal {-code}" if code < 0 else f"its process ended with exit code {code}"
            )
            last = f" ({lines[-1][:_WORDS]})" if lines and code > 0 else ""
            at = self.process.ended_at if isinstance(self.process, Forked) else None
            # Libraries of collectives abort a rank that has lost another one.
            aborted, killed = code == -signal.SIGABRT, code == -signal.SIGKILL
            return retry.RankDied(f"{how}{last}", confirmed=not aborted, at=at, killed=killed)
        return _error(found) if found else None


_StartRank = Callable[[Sequence[str], dict[str, str], Path], Process]
"""Starts a rank with these arguments and variables. The file gets what it writes to standard error."""


def _spawned(arguments: Sequence[str], environment: dict[str, str], said: Path) -> Process:
    with said.open("wb") as output:
        # Its output is in the rank's log. It has a session of its own, because the driver tells the ranks of a Ctrl-C.
        return children.start(
            [sys.executable, "-m", "launcher.start.local_ranks", *arguments],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=output,
            start_new_session=True,
        )


def _forked(
    keeper: Keeper, log: Callable[[str], None], arguments: Sequence[str], environment: dict[str, str], said: Path
) -> Process:
    try:
        with said.open("wb") as output, open(os.devnull, "wb") as nowhere:
            return keeper.start(arguments, environment, outputs=(nowhere.fileno(), output.fileno()))
    except Unprepared as why:
        if environment.get("RANK", "0") == "0":
            log(f"cluster.keeper: {why}. The ranks start without it.")
        return _spawned(arguments, environment, said)


class GivenUp(CapstanError):
    """A rank was killed because it would only wait for another one that is gone."""


def forked_rank(
    keeper: Keeper,
    task: Mapping[str, Any],
    *,
    observe: Callable[[Mapping[str, Any]], None] | None = None,
    leaves: Callable[[], bool] = lambda: False,
    hopeless: Callable[[bool], bool] = lambda asked: False,
) -> None:
    """Have `keeper` fork the rank that this process's environment describes, and return when the rank is done.

    This process passes its signals on to the rank, whose output is its own. `observe` gets the records of the rank's
    steps, and `leaves` tells when the rank's machine is about to leave. `hopeless` tells whether the rank only waits
    for another one that is gone, and gets whether it was asked to stop. It is then killed, as all it knows is kept.

    Raises:
        Unprepared: the keeper cannot fork the rank.
        GivenUp: it was killed for that.
        Exception: what ended the rank, or `retry.RankDied`.
    """
    with scratch_folder("start") as folder, ExitStack() as stack:
        given, outcome = Path(folder, "task.json"), Path(folder, "outcome.json")
        given.write_text(json.dumps({**task, "tells": observe is not None}), encoding="utf-8")
        named = {"observe": observe} if observe is not None else {}
        forked = keeper.start([str(given), str(outcome)], os.environ, outputs=(1, 2), **named)
        stack.callback(forked.wait)
        stack.callback(forked.kill)
        asked, told = stack.enter_context(_passed_on(forked)), False
        while forked.heard(_LOOK_SECONDS) is None:
            if hopeless(asked.is_set()):
                raise GivenUp("another rank has died")
            if not told and leaves():
                told = True
                forked.signal(signal.SIGUSR2)
        if error := _Rank(forked, outcome).error():
            raise error


@contextmanager
def _passed_on(forked: Forked) -> Iterator[threading.Event]:
    """Pass on the signals that ask a rank to stop, and yield whether there was one. Only a main thread gets any."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def pass_on(number: int, _: object) -> None:
        asked.set()
        forked.signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _started(task: Path, ranks: int, serving: int, start: _StartRank) -> Iterator[Sequence[_Rank]]:
    """Start the ranks' processes, and end them with the block. They do not see the last GPUs, which are `serving`."""
    group = list[_Rank]()
    devices = {"CUDA_VISIBLE_DEVICES": ",".join(visible_gpus()[:-serving])} if serving else {}
    try:
        for number, place in enumerate(places(ranks)):
            outcome, said = (task.with_name(f"{name}-{number}") for name in ("outcome.json", "said"))
            process = start([str(task), str(outcome)], {**place, **devices}, said)
            group.append(_Rank(process, outcome, said))
        yield group
    finally:
        for rank in group:
            rank.process.kill()
        for rank in group:
            rank.process.wait()


def _error(found: dict[str, Any]) -> Exception:
    """Return the error that `launcher.start.local_ranks` has reported."""
    if not found["ours"]:
        return type(found["kind"], (Exception,), {})(found["text"])
    kind: type[CapstanError] = getattr(errors, found["kind"])
    error = kind.__new__(kind, *found["arguments"])
    vars(error).update(found["facts"])
    return error


def run_task(given: Path, outcome: Path, forked: ForkedHere | None = None) -> None:
    """Be the rank that the file `given` asks for, and write to the file `outcome` how it ended.

    `forked` is this process as a keeper has forked it.
    """
    task = json.loads(given.read_text(encoding="utf-8"))
    config = parse_config(task["config"])
    datasets = Datasets(**task["datasets"]) if task["datasets"] else None
    try:
        run_rank = imported_rank(config.cluster.gpus_per_worker)
        from trainer.train.start import Starter

        starter = Starter(task.get("facts", {}), task.get("machine") or socket.gethostname(), began=task["began"])
        if forked is not None:
            signal.signal(signal.SIGUSR2, lambda *_: forked.leaving.set())
            starter = replace(starter, kept=forked.kept, preempted=forked.leaving.is_set)
            if task.get("tells"):
                starter = replace(starter, observe=forked.stepped)
        run_rank(config, datasets, resume=task["resume"], starter=starter)
    except Exception as error:
        outcome.write_text(json.dumps(outcome_of(error)), encoding="utf-8")
        raise SystemExit(1) from error
    outcome.write_text("{}", encoding="utf-8")


def outcome_of(error: BaseException) -> dict[str, Any]:
    """Return the error that ended a rank, as JSON. Its kind is the nearest one of `trainer.errors`, whose exit code and
    retries it has: other modules' kinds need not be imported where it is read.
    """
    if not isinstance(error, CapstanError):
        return {"kind": type(error).__name__, "ours": False, "text": str(error)}
    kind = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    return {"kind": kind, "ours": True, "arguments": error.args, "facts": vars(error)}


if __name__ == "__main__":
    run_task(Path(sys.argv[1]), Path(sys.argv[2]))
