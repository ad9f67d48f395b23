"""`capstan train` and `capstan resume`: checks, data, the claim of the name, then ranks.

Everything that can be wrong without a rank is found here, before torch is imported or a process group waits.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from launcher.ray_train import run_on_ray
from launcher.status import SILENT_SECONDS, read_status, request_stop, watch
from trainer import run_layout
from trainer.base import Base, check_base, resolve_base
from trainer.config import Config, dump_config, override
from trainer.data.compile import Progress
from trainer.data.prepare import Datasets, prepare
from trainer.deepspeed_config import build_deepspeed_config
from trainer.errors import AlreadyExists, CapstanError, ConfigError, NothingToResume
from trainer.manifest import committed_steps
from trainer.store import Store, open_store


def start(config: Config, *, resume: bool, live: bool, log: Callable[[str], None]) -> None:
    """Run or continue `config`'s run here and now, as a driver of Ray or as one rank of torchrun's or srun's group.

    Raises:
        CapstanError: with the exit code that the process should end with.
    """
    os.environ.update(slurm_rank(os.environ))
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _as_rank(config, resume=resume, log=log)
        return
    config = anchored(config)
    run = open_store(config.run.store).sub(config.run.name)
    datasets = begin(config, resume=resume, log=log)
    try:
        # Beside the main thread, which is then free for signals: in it, Ray would install handlers of its own.
        with _stop_on_signals(run), _live(run, live), ThreadPoolExecutor(1, "driver") as driver:
            done = driver.submit(run_on_ray, config, datasets, run, resume=resume, log=log)
            while not wait([done], timeout=0.2).done:
                pass
            done.result()
    except CapstanError:
        if not run.list(run_layout.METRICS):
            run.delete(run_layout.CONFIG)  # no rank ever started: the name is free again
        raise


def anchored(config: Config) -> Config:
    """`config` with its relative local paths made absolute: ranks, and a later resume, may have another directory."""

    def absolute(path: str) -> str:
        return path if "://" in path else str(Path(path).expanduser().absolute())

    changes = {"run.store": absolute(config.run.store)}
    for key, path in (("model.base", config.model.base), ("sharding.deepspeed", config.sharding.deepspeed)):
        if Path(path).expanduser().exists():
            changes[key] = absolute(path)
    if config.data.template:
        changes["data.template"] = absolute(config.data.template)
    for what, sources in (("train", config.data.train), ("eval", config.data.eval)):
        moved = [source.model_copy(update={"path": absolute(source.path)}).model_dump() for source in sources]
        changes[f"data.{what}"] = json.dumps(moved)
    return override(config, *(f"{key}={value}" for key, value in changes.items()))


def _as_rank(config: Config, *, resume: bool, log: Callable[[str], None]) -> None:
    config = anchored(config)
    restarted = any(int(os.environ.get(name, 0)) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    datasets = begin(config, resume=resume, restarted=restarted, log=log) if os.environ["RANK"] == "0" else None
    from trainer.rank import run_rank

    run_rank(config, datasets, resume=resume)


def begin(config: Config, *, resume: bool, log: Callable[[str], None], restarted: bool = False) -> Datasets:
    """Check the base, compile missing data and claim the run's name.

    `restarted`: whoever started this process did so before, so the name is this run's already.

    Raises:
        ConfigError: the name is taken, or the base does not fit the settings.
        NothingToResume: `resume`, and nothing is committed.
        DataError, StorageError: the data cannot be compiled.
    """
    base = check(config, resume=resume, restarted=restarted)
    store = open_store(config.run.store)
    run = store.sub(config.run.name)
    datasets = prepare(config, base, store, lambda what, now: log(_describe(what, now)))
    if resume:
        run.put(run_layout.CONFIG, dump_config(config).encode())  # with what this resume changed
    elif not (restarted and run.exists(run_layout.CONFIG)):
        _claim(run, config)
    run.delete(run_layout.STOP)
    return datasets


def check(config: Config, *, resume: bool, restarted: bool = False) -> Base:
    """Everything that can be told without data or ranks; changes nothing. Returns the base."""
    base = resolve_base(config.model)
    check_base(base, config)
    build_deepspeed_config(config, world_size=config.cluster.workers or 1, accumulation=1, on_gpu=False)  # its checks
    run = open_store(config.run.store).sub(config.run.name)
    if resume and not committed_steps(run):
        raise NothingToResume(f"{run.uri} has no committed checkpoint. Start it with `capstan train`.")
    if not (resume or restarted) and _taken_by_another(run):
        raise _taken(config)
    return base


def _taken_by_another(run: Store) -> bool:
    """A name is taken unless its run ended before it had anything to lose."""
    if not run.exists(run_layout.CONFIG):
        return False
    status = read_status(run)
    ended = status.state in ("failed", "silent") or (status.quiet_seconds or 0) > SILENT_SECONDS
    return not ended or bool(committed_steps(run))


def _claim(run: Store, config: Config) -> None:
    if run.exists(run_layout.CONFIG) and not _taken_by_another(run):
        run.delete(run_layout.CONFIG)
    try:
        run.create(run_layout.CONFIG, dump_config(config).encode())
    except AlreadyExists as error:
        raise _taken(config) from error


def _taken(config: Config) -> ConfigError:
    name = config.run.name
    return ConfigError(
        f"run.name: {name!r} exists in {config.run.store}. `capstan resume {name}` continues it; a new run needs another name."
    )


def _describe(what: str, now: Progress) -> str:
    return f"compiling {what} data: file {now.files_done} of {now.files}, {now.documents:,} documents, {now.tokens:,} tokens"


@contextmanager
def _stop_on_signals(run: Store) -> Iterator[None]:
    """SIGTERM, SIGUSR1 and Ctrl-C ask the ranks to commit and stop, which ends this process with exit code 75.

    A second Ctrl-C ends it at once.
    """

    def ask(number: int, _frame: object) -> None:
        request_stop(run, by=signal.Signals(number).name)
        if number == signal.SIGINT:
            print("stopping after a commit; Ctrl-C again ends at once", file=sys.stderr, flush=True)
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _live(run: Store, on: bool) -> Iterator[None]:
    """Show the run's progress on stderr, from its folder, while ranks work."""
    done = threading.Event()
    viewer = threading.Thread(target=watch, args=(run, done.is_set), name="live", daemon=True)
    if on:
        viewer.start()
    try:
        yield
    finally:
        done.set()
        if on:
            viewer.join(timeout=5)


def slurm_rank(environment: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, for a task of an srun step with several; empty elsewhere."""
    if "RANK" in environment or int(environment.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return {}
    nodes = subprocess.run(
        ["scontrol", "show", "hostnames", environment["SLURM_STEP_NODELIST"]],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    ).stdout.split()
    tasks = int(environment["SLURM_STEP_NUM_TASKS"])
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks // len(nodes)),
        "MASTER_ADDR": nodes[0],
        # Every task derives the same port, and jobs that share a node derive different ones.
        "MASTER_PORT": str(20000 + int(environment["SLURM_JOB_ID"]) % 20000),
    }
