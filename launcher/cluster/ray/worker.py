"""The train function of Ray Train: one rank, in a Ray worker, or in a process that its machine's keeper forks."""

import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

from launcher.cluster.ray.keepers import keeper_here
from launcher.cluster.ray.starts import Task, each_start
from launcher.policy import retry
from launcher.start.group import imported_rank
from launcher.start.keeper import Unprepared
from launcher.start.local_ranks import forked_rank
from trainer.config import parse_config
from trainer.data.compile.prepare import Datasets
from trainer.run import layout
from trainer.run.folder import run_folder


def rank_of_worker(arguments: dict[str, Any]) -> None:
    """Be the rank of this worker, in one start of the group after another if keepers fork the ranks."""
    import ray

    config, rank = parse_config(arguments["config"]), int(os.environ["RANK"])
    if rank == 0:
        run_folder(config).put(layout.RANKS_BEGUN, b"")  # before everything that takes a while on a slow disk
    machine = f"{socket.gethostname()}/{ray.get_runtime_context().get_node_id()[:8]}"
    # Rank 0's notice alone counts, and its reason is that of all.
    preempted = _drain_notice() if arguments["joined"] and rank == 0 else lambda: False
    keepers, starts, observe = arguments.pop("keepers"), arguments.pop("starts"), _gauges(config.run.name)
    task = arguments = arguments | {"machine": machine}
    if keepers is not None:

        def forked(newest: Task, given_up: Callable[[], bool]) -> Exception | None:
            nonlocal task
            task, keeper = arguments | dict(newest), keeper_here(keepers, rank)
            try:
                forked_rank(keeper, task, observe=observe, leaves=preempted, hopeless=lambda _: given_up())
            except Unprepared:
                raise
            except Exception as error:
                if isinstance(error, retry.RankDied) and error.at is None:
                    _check_machine(keepers, rank, error)
                return error
            return None

        try:
            each_start(starts, rank, task, forked)
            return
        except Unprepared as why:
            print(f"cluster.keeper: {why}. Rank {rank} starts without it.", flush=True)
    config = parse_config(task["config"])
    run_rank = imported_rank(config.cluster.gpus_per_worker)
    from trainer.train.start import Starter

    starter = Starter(task["facts"], machine, preempted, observe, task["began"])
    run_rank(config, Datasets(**task["datasets"]), resume=task["resume"], starter=starter)


def _check_machine(keepers: Any, rank: int, died: retry.RankDied) -> None:
    """Raise `RankDied` if the keeper of a rank that `died` was not all that has ended on this machine."""
    try:
        keeper_here(keepers, rank)
    except Unprepared:
        raise retry.RankDied(str(died), confirmed=False) from None


def _drain_notice() -> Callable[[], bool]:
    """Return whether Ray has announced that a node of this group will be taken away.

    Ray tells each rank's process of it. Its public question, `ray.train.get_preemption_info`, only reads that, and is a
    barrier of all ranks in one actor besides: among 1,024 ranks one did not end in two minutes.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    told = get_train_context().preemption_context
    return lambda: told.preemption_info is not None


def _gauges(run: str) -> Callable[[Mapping[str, float]], None]:
    """Puts rank 0's step records into Ray's Prometheus metrics: capstan_step, capstan_loss and so on."""
    from ray.util.metrics import Gauge

    gauges = {
        name: Gauge(f"capstan_{name}", description, tag_keys=("run",))
        for name, description in (
            ("step", "Optimizer steps done"),
            ("loss", "Loss of the last step, nats a target token"),
            ("tokens_per_second", "Tokens a second of the last step, all ranks"),
            ("restarts", "Starts of the run after its first"),
        )
    }
    for gauge in gauges.values():
        gauge.set_default_tags({"run": run})

    def show(record: Mapping[str, float]) -> None:
        for name, gauge in gauges.items():
            gauge.set(record[name])

    return show
