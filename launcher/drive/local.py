"""`capstan train` and `capstan resume`: the run here and now, as its driver or as one rank of a group."""

import os
from collections.abc import Callable
from contextlib import ExitStack

from rich.filesize import decimal

from launcher.cluster.ray.cluster import address_of, check_ray
from launcher.doctor.doctor import ask_torch
from launcher.drive.driver import drive
from launcher.report.report import keep_report
from launcher.start.check import (
    about_type,
    anchored,
    check,
    refuse_replacing,
    refuse_spares,
    typed_elsewhere,
    with_found,
)
from launcher.start.claim import claimed, keep_code, wait_for_first_rank
from launcher.start.group import group_name, imported_rank, is_rank, is_silent_rank, restarted_as, slurm_rank
from launcher.start.local_ranks import check_servers_here, ranks_here
from launcher.start.sidecars import sidecars_here
from launcher.view.compiling import compile_progress
from trainer.config import Config
from trainer.data.compile.prepare import prepare
from trainer.data.dataset.chapters import forget_given_up
from trainer.evaluate.rollout.rewards import check_reward
from trainer.plan.resolve import Resolved
from trainer.processes.children import end_with_agent
from trainer.processes.devices import check_device, local_gpus
from trainer.run.folder import run_folder
from trainer.run.owner import preparing
from trainer.store.scratch import collect_leftovers
from trainer.store.store import open_run_store

_MUCH = 10**9
"""A base of so many bytes takes longer to read than a person expects of a start."""


def start(config: Config, *, resume: bool, take_over: bool, live: bool, log: Callable[[str], None]) -> None:
    """Run or continue `config`'s run here and now, as its driver or as one rank of torchrun's or srun's group.

    `take_over`: also when the run is alive.

    Raises:
        CapstanError: with the exit code that the process should end with.
    """
    end_with_agent()
    os.environ.update(slurm_rank(os.environ))
    config = anchored(config)
    if is_rank() and os.environ.get("LOCAL_RANK", "0") == "0":
        collect_leftovers()  # a rank itself may make no folder
    if is_silent_rank():
        # There is no process group yet, because rank 0 may compile for longer than a collective waits. Torchrun ends
        # the other ranks itself when rank 0 ends; srun may not.
        wait_for_first_rank(config, None if "TORCHELASTIC_RUN_ID" in os.environ else group_name(os.environ))
        imported_rank(config.cluster.gpus_per_worker)(config, None, resume=resume)
    elif is_rank():
        _as_first_rank(config, resume=resume, take_over=take_over, log=log)
    else:
        _as_driver(config, resume=resume, take_over=take_over, live=live, log=log)


def checked_here(
    config: Config, *, resume: bool, take_over: bool, log: Callable[[str], None]
) -> tuple[Config, Resolved]:
    """Return `config` as this machine's driver starts it, and what was found for it. Raises what refuses the start."""
    address = address_of(config)
    if address is None:
        refuse_replacing(config, "all ranks are on this machine")
        refuse_spares(config, "all ranks are on this machine")
        check_local_device(config)
    else:
        config = typed_elsewhere(config, log)
    if address or ranks_here(config) is None:
        check_ray(f"cluster.ray.address: {address}" if address else "cluster.ray")
    resolved = check(config, resume=resume, take_over=take_over)
    if address is None:
        check_reward(config.rollout)
    if address is None and (sentence := about_type(config, resolved.config)):
        log(sentence)
    return with_found(config, resolved), resolved


def _as_driver(config: Config, *, resume: bool, take_over: bool, live: bool, log: Callable[[str], None]) -> None:
    by = f"capstan {'resume' if resume else 'train'}"
    with ExitStack() as taken:
        with preparing(run_folder(config), by):
            config, resolved = checked_here(config, resume=resume, take_over=take_over, log=log)
            if (size := sum(bytes_each for _, bytes_each, _ in resolved.base.versions)) >= _MUCH:
                log(f"{decimal(size)} of the base are read before the first step; `capstan status` shows the progress")
            claim = claimed(config, by=by, resume=resume, code=keep_code(log), log=log, take_over=take_over)
            owner = taken.enter_context(claim)
        drive(config, owner, resume=resume, live=live, log=log)


def _as_first_rank(config: Config, *, resume: bool, take_over: bool, log: Callable[[str], None]) -> None:
    group, again = group_name(os.environ), restarted_as(os.environ)
    by = f"capstan {'resume' if resume else 'train'}"
    with ExitStack() as taken:
        with preparing(run_folder(config), by):
            refuse_replacing(config, "torchrun and srun start the ranks on the same machines again")
            refuse_spares(config, "torchrun and srun start the ranks on the same machines again")
            check_local_device(config)
            check_servers_here(config, int(os.environ["LOCAL_WORLD_SIZE"]))
            resolved = check(config, resume=resume, take_over=take_over, again=again)
            check_reward(config.rollout)
            if sentence := about_type(config, resolved.config):
                log(sentence)
            config, code = with_found(config, resolved), keep_code(log)
            how = {"by": by, "take_over": take_over, "group": group, "again": again}
            taken.enter_context(claimed(config, resume=resume, code=code, log=log, **how))
        with compile_progress(log, bar=False) as show:
            datasets = prepare(config, resolved.base, open_run_store(config), show)
        try:
            forget_given_up(run_folder(config))
            with sidecars_here(config, run_folder(config), log):
                imported_rank(config.cluster.gpus_per_worker)(config, datasets, resume=resume)
        finally:
            keep_report(run_folder(config), log)


def check_local_device(config: Config) -> None:
    """Raise `ConfigError` if ranks on this machine would be on the CPU unasked.

    torch is asked only if that is possible.
    """
    asked = config.cluster.gpus_per_worker
    if asked == 0 or (asked is None and not local_gpus()):
        return
    facts = ask_torch()
    if not isinstance(facts, str):  # a user who cannot import torch finds out soon
        check_device(asked, len(facts["gpus"]), facts["build"])
