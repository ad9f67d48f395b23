"""`capstan train` and `capstan resume`: the run here and now, as the driver of its own Ray or as one rank of a group."""

import os
from collections.abc import Callable

from launcher.doctor import ask_torch
from launcher.drive.driver import drive
from launcher.ray.cluster import address_of
from launcher.start.claim import anchored, check, claim, keep_code, release
from launcher.start.group import is_rank, is_silent_rank, slurm_rank
from launcher.view.compiling import compile_progress
from trainer.base.locate import Base, resolve_base
from trainer.config import Config
from trainer.data.prepare import Datasets, prepare, wait_until_prepared
from trainer.devices import check_device, local_gpus, stay_on_cpu
from trainer.errors import CapstanError
from trainer.run import layout
from trainer.scratch import collect_leftovers
from trainer.store import Store, open_run_store


def start(config: Config, *, resume: bool, live: bool, log: Callable[[str], None]) -> None:
    """Run or continue `config`'s run here and now, as a driver of Ray or as one rank of torchrun's or srun's group.

    Raises:
        CapstanError: with the exit code that the process should end with.
    """
    os.environ.update(slurm_rank(os.environ))
    config = anchored(config)
    if is_rank():
        _as_rank(config, resume=resume, log=log)
        return
    if address_of(config) is None:
        _check_device(config)
    check(config, resume=resume)
    run = claim(config, resume=resume, code=keep_code(log))
    try:
        drive(config, resume=resume, live=live, log=log)
    except CapstanError:
        if not run.list(layout.METRICS):
            release(run)  # no rank ever started: the name is free again
        raise


def _as_rank(config: Config, *, resume: bool, log: Callable[[str], None]) -> None:
    restarted = any(int(os.environ.get(name, 0)) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
    datasets = None
    if os.environ.get("LOCAL_RANK", "0") == "0":
        collect_leftovers()
    store = open_run_store(config)
    if is_silent_rank():
        # Without a process group: rank 0 may compile for longer than a collective waits, and ends everybody if it fails.
        wait_until_prepared(config, resolve_base(config.model), store)
    else:
        _check_device(config)
        base = check(config, resume=resume, restarted=restarted)
        datasets = _prepare(config, base, store, log)
        claim(config, resume=resume, code=keep_code(log), restarted=restarted)
    if config.cluster.gpus_per_worker == 0:
        stay_on_cpu()
    from trainer.rank import run_rank

    run_rank(config, datasets, resume=resume)


def _check_device(config: Config) -> None:
    """Raises `ConfigError` where ranks on this machine would be on the CPU unasked; torch tells only where that may be."""
    asked = config.cluster.gpus_per_worker
    if asked == 0 or (asked is None and not local_gpus()):
        return
    facts = ask_torch()
    if not isinstance(facts, str):  # whoever cannot import torch finds out soon
        check_device(asked, len(facts["gpus"]), facts["build"])


def _prepare(config: Config, base: Base, store: Store, log: Callable[[str], None]) -> Datasets:
    with compile_progress(log, bar=False) as show:
        return prepare(config, base, store, show)
