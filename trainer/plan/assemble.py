"""Puts a run's ranks and its model together: the ranks join each other, and each gets its part of the model.

Every program on a run's ranks goes through here in this order: `join_run`, `trainer.plan.resolve.resolve_alike`,
`settle`, `attention_of`, `choose_sharding`, `assemble`.
"""

import os
import socket
from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.base.base import Base
from trainer.base.find.locate import in_bucket
from trainer.base.load.front import load_front
from trainer.base.load.load import DTYPES, LoadReport, load_model
from trainer.config import Config
from trainer.config.row_kinds import ROW_KINDS
from trainer.config.training import EXPERTS_AT_ONCE
from trainer.errors import ConfigError
from trainer.model.attention import Attention, choose_attention
from trainer.model.balance import Loss, balanced
from trainer.model.front import Front
from trainer.model.held.layers import HeldStack, multiply_in_fp8
from trainer.model.kernels.attention import kernels_without_masks, kernels_without_pictures
from trainer.model.packed import PackedModel
from trainer.model.rows.heads import uneven_ranks
from trainer.model.rows.row import Peers, RankPeers
from trainer.model.towers import Lender
from trainer.plan.inputs import most_whole
from trainer.plan.plan import choose_experts_at_once, choose_scope, idle_settings, settled
from trainer.plan.resolve import Resolved
from trainer.processes.accelerator import is_accelerator, kind
from trainer.processes.devices import check_device
from trainer.processes.ranks import Ranks, Team, World, add_in_one_order, join
from trainer.state.kept import Shares, words_sum
from trainer.state.zero.engine import Engine
from trainer.state.zero.policy import Scope, build_deepspeed_config


def join_run(config: Config, is_gone: Callable[[int], bool] = lambda rank: False) -> Team:
    """Join the other ranks, on the device and with the threads that the settings say.

    `is_gone` tells whether one of them has ended meanwhile.

    Raises:
        ConfigError: this process does not see the GPUs that it should, or the ranks cannot share rows as the settings
            say.
        CapstanError: not all ranks have come within `timeouts.meet`, or one has ended meanwhile.
    """
    check_device(config.cluster.gpus_per_worker, *torch_gpus())
    # Ranks have several communicators (two of all, others of a node and of those that share a row). Their kernels may
    # reach two GPUs in different orders, and then wait for each other. NCCL 2.26 and later keep the order in which the
    # host started them. NCCL reads its variables when it makes its first communicator.
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    os.environ.update(config.cluster.nccl_variables)
    if config.train.deterministic and kind():
        add_in_one_order()
    # A collective may last longer than the heartbeat's limits, because the heartbeat names the rank that hangs.
    limit = timedelta(seconds=120 + max(config.timeouts.model_dump().values()))
    ranks = join(limit, timedelta(seconds=config.timeouts.meet), is_gone)
    cores = len(os.sched_getaffinity(0))
    if wrong := uneven_ranks(config.sharding.sequence_parallel, ranks.world_size, ranks.ranks_per_node):
        raise ConfigError(wrong)
    torch.set_num_threads(config.cluster.threads_per_worker or max(1, cores // ranks.ranks_per_node))
    return ranks


def torch_gpus() -> tuple[int, str | None]:
    """Return how many GPUs torch sees, and the CUDA or ROCm version that it was built for; None is a CPU build."""
    return torch.cuda.device_count(), torch.version.cuda or torch.version.hip


def check_same_base(base: Base, ranks: World) -> None:
    """Raise `ConfigError` if the nodes have copies of the base with different weights. Collective."""
    if in_bucket(base.name):
        return
    copies = ranks.together(lambda: (socket.gethostname(), base.samples if ranks.local_rank == 0 else None))
    host, weights = copies[0]
    for other, found in copies:
        if found is not None and found != weights:
            raise ConfigError(
                f"model.base: {base.name} has other weights on {other} than on {host}. Copy one of them to every"
                " machine."
            )


def settle(resolved: Resolved, ranks: Ranks, log: Callable[[str], None]) -> Resolved:
    """Decide the settings that depend on the memory of these ranks. Collective. `log` gets a line on them."""
    config, architecture = resolved.config, resolved.base.architecture
    memory = ranks.least_device_memory() or ranks.least_host_memory()
    # If nodes have different numbers of ranks, each node would decide by its own number.
    decided: Config = ranks.broadcast(settled(config, architecture, ranks.world_size, ranks.ranks_per_node, memory))
    layers, asked = architecture.layers, config.train.activation_checkpointing
    why = f"auto, for {memory / 2**30:.1f} GiB a rank" if asked == "auto" else f"as set: {asked}"
    log(f"activation checkpointing: {layers - decided.train.kept_layers(layers)} of {layers} layers ({why})")
    for sentence in idle_settings(config, decided, architecture):
        log(sentence)
    return replace(resolved, config=decided)


def attention_of(resolved: Resolved, device: torch.device) -> Attention:
    """Return the attention kernel for the run's settings, base and method.

    Raises `ConfigError` when the kernel that the settings name cannot be used.
    """
    model, masked = resolved.config.model, kernels_without_masks(resolved.config.data.share_prefix)
    blind = kernels_without_pictures(ROW_KINDS[resolved.config.data.kind].sees)
    refused = {**resolved.method.virtual.refused_kernels, **masked, **blind}
    needs = resolved.base.architecture.attention_needs
    return choose_attention(model.attention, device, DTYPES[model.dtype], needs, refused, masked=bool(masked))


class ShardingPlan(NamedTuple):
    """How the model is divided.

    It has DeepSpeed's settings, the ranks that hold one copy of the frozen base together, and the bytes of a mixture's
    experts that a rank dequantizes at once.
    """

    deepspeed: dict[str, Any]
    scope: Scope
    experts_at_once: int = EXPERTS_AT_ONCE


def choose_sharding(resolved: Resolved, ranks: Team, accumulation: int) -> ShardingPlan:
    """Return the sharding that the settings say, or that suits these ranks, for so many micro-batches a step.

    Collective.
    """
    config, architecture = resolved.config, resolved.base.architecture
    settings = build_deepspeed_config(
        config,
        world_size=ranks.world.world_size,
        accumulation=accumulation,
        on_gpu=is_accelerator(ranks.device),
        whole=most_whole(config, architecture),
    )
    world = ranks.world
    memory = world.least_device_memory() if world.have_even_nodes() else None
    sizes = config, architecture, world.world_size, world.ranks_per_node
    scope = choose_scope(*sizes, memory)
    return ShardingPlan(settings, scope, choose_experts_at_once(*sizes, scope, memory))


def assemble(
    resolved: Resolved,
    ranks: Team,
    attention: Attention,
    sharding: ShardingPlan,
    log: Callable[[str], None] = lambda text: None,
    kept: Shares | None = None,
    of_features: Collection[str] | None = None,
) -> tuple[Engine, LoadReport]:
    """Load the base, attach what learns, and put DeepSpeed around it. Collective. `log` gets rank 0's progress.

    This rank's share of the base is found in `kept`, or left there. `of_features` are the weights of the tower
    which rows over kept features need; without it all are loaded.

    Raises:
        CapstanError: on every rank, if one cannot read a tensor, or the files lack it or have it in another shape or
            type.
    """
    config, base, method = resolved.config, resolved.base, resolved.method
    model, report = load_model(base, config, sharding.deepspeed, ranks.world, attention, sharding.scope, log, kept)
    for stack in (module for module in model.modules() if isinstance(module, HeldStack)):
        stack.at_once = sharding.experts_at_once
    if config.train.products == "fp8":
        log(f"products: fp8 in {multiply_in_fp8(model, ranks.device)}")
    method.attach(model, base.architecture, DTYPES[config.model.dtype], config.run.seed)
    before = checksums(model)
    groups = method.groups(model, config.optim)
    facts, peers = base.architecture, peers_of(config, ranks.world)
    front = _front_of(resolved, ranks, attention, log, of_features)
    lender = next((module for module in model.children() if isinstance(module, Lender)), None)
    if lender is not None:
        assert front is not None, "a tower that learns, and rows without pictures"
        front.learn(lender, again=config.train.kept_layers(facts.layers) < facts.layers)
    packed = PackedModel(
        *(model, attention, method.virtual.reserved, peers),
        padding=facts.padding,
        isolates=facts.isolates_documents,
        front=front,
        lender=lender,
    )
    engine = Engine(packed, loss_of(resolved, model), groups, config.optim, sharding.deepspeed, ranks)
    assert checksums(model) == before, "deepspeed.initialize changed packed weights"
    return engine, report


def _front_of(
    resolved: Resolved,
    ranks: Team,
    attention: Attention,
    log: Callable[[str], None],
    needed: Collection[str] | None,
) -> Front | None:
    """The base's tower, if the rows have pictures. Collective, as a rank that cannot read it ends all."""
    config, base = resolved.config, resolved.base
    if not ROW_KINDS[config.data.kind].sees:
        return None
    with ranks.world.agreeing():
        front, size = load_front(
            base, config.model.layers, DTYPES[config.model.dtype], attention.name, ranks.device, needed
        )
    if ranks.rank == 0:
        what = "frozen, whole on each rank" if needed is None else "all that a run over kept features needs of it"
        log(f"the base's tower (encoder and projector): {size / 2**20:,.1f} MiB, {what}")
    return front


def loss_of(resolved: Resolved, model: nn.Module) -> Loss:
    """Return the objective's loss, with the balancing loss of the routers beside it if `objective.router_loss` asks."""
    asked, objective = resolved.config.objective, resolved.objective
    if not asked.router_loss:
        return objective.loss
    return balanced(objective.loss, objective.weight, model, asked.router_loss, asked.router_loss_of)


def peers_of(config: Config, world: World) -> Peers | None:
    """Return the ranks that share rows with this one, which follow each other. Collective.

    None means that each rank has rows of its own.
    """
    size = config.sharding.sequence_parallel
    return None if size == 1 else RankPeers(world.group_of(size))


def checksums(model: nn.Module) -> dict[str, int]:
    """Return a sum over this rank's bytes of each packed parameter, to show that nothing cast or moved them."""
    parts: dict[str, Tensor] = {
        name: parameter.ds_tensor  # type: ignore[attr-defined]
        for name, parameter in model.named_parameters()
        if parameter.dtype == torch.uint8
    }
    # Each is read by itself: if partitions are offloaded, those of small parameters are on the GPU and the others on
    # the host.
    return {name: words_sum(part) for name, part in parts.items()}
