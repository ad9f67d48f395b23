"""The beginning of every program on a run's ranks: they join each other, and divide the run's model among them."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta

import torch

from trainer.base.find.locate import Base, in_bucket
from trainer.base.load.load import LoadReport
from trainer.config import Config
from trainer.devices import check_device
from trainer.errors import ConfigError
from trainer.model.attention import Attention
from trainer.objective.objective import Objective
from trainer.plan.plan import choose_scope, idle_settings, settled
from trainer.plan.sizes import most_whole
from trainer.ranks import Ranks, join
from trainer.train.assemble import assemble
from trainer.zero.engine import Engine
from trainer.zero.policy import build_deepspeed_config


def join_run(config: Config, is_gone: Callable[[], bool] = lambda: False) -> Ranks:
    """Join the other ranks on the device and with the threads that the settings say. `is_gone` tells whether rank 0 has ended meanwhile.

    Raises:
        ConfigError: this process does not see the GPUs that it should.
        CapstanError: not all ranks have come within `timeouts.meet`, or rank 0 has ended meanwhile.
    """
    check_device(config.cluster.gpus_per_worker, *torch_gpus())
    os.environ.update(config.cluster.nccl_variables)  # NCCL reads them when it makes its first communicator
    # A collective may last longer than the heartbeat's limits, as the heartbeat names the rank that hangs.
    limit = timedelta(seconds=120 + max(config.timeouts.model_dump().values()))
    ranks = join(limit, timedelta(seconds=config.timeouts.meet), is_gone)
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(config.cluster.threads_per_worker or max(1, cores // ranks.ranks_per_node))
    return ranks


def check_same_base(base: Base, ranks: Ranks) -> None:
    """Raises `ConfigError` where the nodes have copies of the base with different weights. Collective."""
    if in_bucket(base.name):
        return
    copies = ranks.together(lambda: (socket.gethostname(), base.samples if ranks.local_rank == 0 else None))
    host, weights = copies[0]
    for other, found in copies:
        if found is not None and found != weights:
            raise ConfigError(
                f"model.base: {base.name} has other weights on {other} than on {host}. Copy one of them to every machine."
            )


def torch_gpus() -> tuple[int, str | None]:
    """How many GPUs torch sees, and the CUDA or ROCm version that it was built for; None is a CPU build."""
    return torch.cuda.device_count(), torch.version.cuda or torch.version.hip


def settle(config: Config, base: Base, ranks: Ranks, log: Callable[[str], None]) -> Config:
    """The settings with what depends on the memory of these ranks decided; `log` gets a line on it. Collective."""
    memory = ranks.least_device_memory() or ranks.least_host_memory()
    # Where nodes have different numbers of ranks, each would decide by its own.
    decided: Config = ranks.broadcast(
        settled(config, base.architecture, ranks.world_size, ranks.ranks_per_node, memory)
    )
    layers, asked = base.architecture.layers, config.train.activation_checkpointing
    why = f"auto, for {memory / 2**30:.1f} GiB a rank" if asked == "auto" else f"as set: {asked}"
    log(f"activation checkpointing: {layers - decided.train.kept_layers(layers)} of {layers} layers ({why})")
    for sentence in idle_settings(config, decided, base.architecture):
        log(sentence)
    return decided


def assemble_run(
    config: Config,
    base: Base,
    ranks: Ranks,
    attention: Attention,
    objective: Objective,
    accumulation: int,
    log: Callable[[str], None],
) -> tuple[Engine, LoadReport]:
    """The run's engine, divided as `sharding` says, or as suits these ranks; the rest is as in `assemble`. Collective."""
    settings = build_deepspeed_config(
        config,
        world_size=ranks.world_size,
        accumulation=accumulation,
        on_gpu=ranks.device.type == "cuda",
        whole=most_whole(config, base.architecture),
    )
    memory = ranks.least_device_memory() if ranks.have_even_nodes() else None
    scope = choose_scope(config, base.architecture, ranks.world_size, ranks.ranks_per_node, memory)
    return assemble(base, config, settings, ranks, attention, scope, objective, log)
