"""The needs of a run, by arithmetic: parameters, memory, batch, traffic. No GPU, no torch, nothing downloaded.

Everything that does not fit or does not match is reported at once, in `Plan.shortfalls`. Counts of parameters and bytes
of stored tensors are exact. Activations, gathered layers and host memory are estimates, by the formulas stated at each
function.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from math import ceil

from trainer.base.architecture import Architecture
from trainer.base.base import Description
from trainer.config import Config
from trainer.config.row_kinds import ROW_KINDS
from trainer.config.training import EXPERTS_AT_ONCE, FP8_ROWS_EACH
from trainer.model.rows.heads import uneven_ranks
from trainer.plan.inputs import Inputs, copies_updates, exchanged_values, most_whole, multiplies_in_fp8, value_bytes
from trainer.plan.memory import base_bytes, memory_of, offloaded_activations, offloaded_base, offloaded_states
from trainer.plan.needs import GlobalBatch, HostMemory, Parameters, Plan, Traffic, WholeWeights
from trainer.plan.resolve import mismatches
from trainer.processes.devices import pinned_bytes
from trainer.state.zero.policy import Scope, build_deepspeed_config
from trainer.tuning.method import method_of

# trainer/base/partitions/reading.py: pieces of the base read ahead and the one that is quantized, each twice while it
# is handed over.
_READ_BYTES = 2 * 9 * 4 * 2**20
# The share of a rank's memory up to which layers keep their activations, and then experts are dequantized. The plan is
# within 12 % of what is measured. Kept activations save more time a byte.
_KEPT_SHARE = 0.85


def make_plan(
    config: Config,
    base: Description,
    world_size: int,
    ranks_per_node: int,
    gpu_memory: int | None,
    host_memory: int | None = None,
) -> Plan:
    """Plan a run on `world_size` ranks, `ranks_per_node` of them on each node.

    Args:
        base: what config.json says of the base.
        gpu_memory: bytes of one GPU; None when there is none to compare with.
        host_memory: bytes that a rank on CPUs has for itself, if they are known.

    Raises:
        ConfigError: the method, the objective or the optimizer is unknown, or the DeepSpeed policy cannot be used.
    """
    asked, memory_of_rank = config, gpu_memory or host_memory
    config = settled(config, base.architecture, world_size, ranks_per_node, memory_of_rank)
    scope = choose_scope(config, base.architecture, world_size, ranks_per_node, gpu_memory)
    given = _inputs(config, base.architecture, world_size, ranks_per_node, scope)
    given = replace(given, experts_at_once=_experts_at_once(given, gpu_memory))
    memory = memory_of(given)
    wrong = mismatches(asked, base, given.method, given.objective)
    return Plan(
        parameters=_parameters(given),
        batch=_batch(given),
        memory_per_gpu=memory,
        memory_per_host=_host_memory(given),
        traffic_per_step=_traffic(given),
        checkpoint_bytes=given.checkpoint_bytes,
        scope=scope,
        layers=given.model.layers,
        recomputed_layers=given.recomputed_layers,
        device="cpu" if config.cluster.gpus_per_worker == 0 else "gpu",
        deepspeed=given.deepspeed,
        mismatches=wrong,
        shortfalls=[*wrong, *_shortfalls(given, memory.total, gpu_memory)],
        notes=[
            *_untried(base.architecture),
            *idle_settings(asked, config, base.architecture),
            *_undecided(asked, base.architecture, memory_of_rank),
            *_products(config, base.architecture),
        ],
        unrecognised=list(base.unrecognised),
        whole=_whole(config, base.architecture),
    )


def _untried(model: Architecture) -> Iterator[str]:
    if not model.tried:
        yield (
            "no small model of the base was tried, because its code does not run at other sizes. So it is not known"
            " whether it computes rightly with weights in 4 bits, and each row has one document."
        )


def _whole(config: Config, model: Architecture) -> list[WholeWeights]:
    """Return the matrices that the quantization leaves as they are. A run that quantizes nothing has none."""
    if not config.quant.held.packs:
        return []
    item = value_bytes(config)
    return [WholeWeights(name, why, count, item * count) for (name, why), count in model.whole().items()]


def settled(config: Config, model: Architecture, world_size: int, ranks_per_node: int, memory: int | None) -> Config:
    """Return the settings with `train.activation_checkpointing: auto` decided for ranks of `memory` bytes each.

    As many layers keep their activations as the plan has room for. No layer does if the memory is not known, or if not
    everything that layers keep is counted.
    """
    if config.train.activation_checkpointing != "auto":
        return config
    kept = 0
    if memory is not None and _counts_all_activations(config, model):
        room = _KEPT_SHARE * memory
        scope = choose_scope(config, model, world_size, ranks_per_node, memory)
        given = _inputs(config, model, world_size, ranks_per_node, scope)

        def is_too_much(layers: int) -> bool:
            return memory_of(replace(given, config=_keeping(config, layers))).total > room

        kept = max(0, bisect_right(range(model.layers + 1), False, key=is_too_much) - 1)
    return _keeping(config, kept)


def idle_settings(asked: Config, decided: Config, model: Architecture) -> Iterator[str]:
    """Yield a sentence for each requested setting that has no effect after `settled`, or on the ranks of this run."""
    if not asked.train.activation_offload:
        return
    if asked.cluster.gpus_per_worker == 0:
        yield "train.activation_offload: has no effect on CPUs, whose memory is the host's."
    elif asked.train.activation_checkpointing == "auto" and decided.train.kept_layers(model.layers) == model.layers:
        yield (
            f"train.activation_offload: has no effect, as there is room for the activations of all {model.layers}"
            " layers and train.activation_checkpointing: auto has none computed again. Set that to all to keep their"
            " inputs on the host."
        )


def _products(config: Config, model: Architecture) -> Iterator[str]:
    """Yield a sentence on which products are in FP8, if FP8 is asked for."""
    if config.train.products == "fp8":
        some, of = (
            [
                sum(one.kind == kind and (multiplies_in_fp8(config, one) or counted) for one in model.parameters)
                for kind in ("linear", "experts")
            ]
            for counted in (False, True)
        )
        experts = ""
        if of[1]:
            experts = (
                f" Also in {some[1]} of {of[1]} stacks of experts, on GPUs of compute capability 9.0 and 10.0. Experts"
                f" with fewer than {FP8_ROWS_EACH:,} rows on average multiply plainly, which is faster."
            )
        yield (
            f"train.products: fp8 in {some[0]} of {of[0]} linear layers, on GPUs of compute capability 8.9 to 11."
            f"{experts} The time below is that of plain products where no run of this GPU was measured."
        )


def _undecided(asked: Config, model: Architecture, memory: int | None) -> Iterator[str]:
    """Yield a sentence if the run will decide by a memory that the plan does not know."""
    if asked.train.activation_checkpointing == "auto" and memory is None and _counts_all_activations(asked, model):
        yield (
            "train.activation_checkpointing: auto counts all layers as computed again here, as the memory of a rank is"
            " not known. The run computes none again that it has room for, which is faster."
        )


def _counts_all_activations(config: Config, model: Architecture) -> bool:
    """Return whether `trainer.plan.memory` knows everything that a layer keeps.

    It does not if tokens are mixed by something other than attention, or by attention that may need a kernel which
    keeps scores.
    """
    has_plain_attention = len(model.attention) == model.layers and not (model.has_sinks or model.caps_attention)
    keeps_scores = config.model.attention == "eager" or not model.supports_sdpa
    # With dropout every adapted layer keeps an input of its own, and what was dropped of it.
    counted = method_of(config).counts_activations and not config.tuning.dropout
    counted = counted and (config.tuning.towers is None or model.kept_of_pictures is not None)
    return has_plain_attention and not keeps_scores and counted


def _keeping(config: Config, layers: int) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"activation_checkpointing": layers})})


def choose_scope(
    config: Config, model: Architecture, world_size: int, ranks_per_node: int, gpu_memory: int | None
) -> Scope:
    """Return `sharding.scope`, with auto decided.

    The scope is node if there are several nodes, all alike, and a GPU is known to hold its part of a whole base a node.
    Then no frozen weight crosses the network. Otherwise it is world, and also if the base itself learns.
    """
    if config.sharding.scope != "auto":
        return config.sharding.scope
    if method_of(config).trains_base:
        return "world"
    if gpu_memory is None or world_size <= ranks_per_node or world_size % ranks_per_node:
        return "world"
    given = _inputs(config, model, world_size, ranks_per_node, "node")
    return "node" if memory_of(given).total <= gpu_memory else "world"


def choose_experts_at_once(
    config: Config, model: Architecture, world_size: int, ranks_per_node: int, scope: Scope, gpu_memory: int | None
) -> int:
    """Return the bytes of a mixture's experts to dequantize at once, for settings that are `settled`.

    With enough room beside everything else it is the largest stack of a layer. Then the host need not wait to learn
    which experts are visited.
    """
    return _experts_at_once(_inputs(config, model, world_size, ranks_per_node, scope), gpu_memory)


def _experts_at_once(given: Inputs, gpu_memory: int | None) -> int:
    stacks = [given.item * one.numel for one in given.model.parameters if one.kind == "experts"]
    largest = max(stacks, default=0)
    # A smaller stack needs no more, so most plans (`--longest` makes many) need no second sum.
    if gpu_memory is None or largest <= EXPERTS_AT_ONCE:
        return EXPERTS_AT_ONCE
    has_room = memory_of(replace(given, experts_at_once=largest)).total <= _KEPT_SHARE * gpu_memory
    return largest if has_room else EXPERTS_AT_ONCE


def _inputs(config: Config, model: Architecture, world_size: int, ranks_per_node: int, scope: Scope) -> Inputs:
    groups = max(1, world_size // config.sharding.sequence_parallel)
    accumulation = ceil(config.train.global_batch / (groups * config.train.micro_batch))
    on_gpu = config.cluster.gpus_per_worker != 0
    deepspeed = build_deepspeed_config(config, world_size, accumulation, on_gpu, most_whole(config, model))
    return Inputs(config, model, deepspeed, world_size, ranks_per_node, accumulation, scope)


def _parameters(given: Inputs) -> Parameters:
    weights = given.model.weights
    embedding, linear, small = weights("embedding", "head"), weights("linear", "experts"), weights("small")
    frozen = embedding + linear + small - given.learning_base
    return Parameters(embedding, linear, small, frozen, given.trainable, frozen + given.trainable)


def _batch(given: Inputs) -> GlobalBatch:
    """Return the global batch. Time is counted in passes.

    With frozen weights a backward pass makes as many products as a forward pass, and twice as many if the weights
    learn. Activation checkpointing repeats the forward pass of its layers. A survey takes some of the tokens, one
    forward pass each, and leaves the others to the loss.
    """
    train = given.config.train
    rows = given.accumulation * given.data_groups * train.micro_batch
    surveyed = given.survey.share if given.survey else 0
    of_loss = 2 + (1 - given.kept_layers / given.model.layers) + given.method.trains_base
    passes = surveyed + (1 - surveyed) * of_loss
    stored = given.reference == "stored"
    return GlobalBatch(
        world_size=given.world_size,
        data_groups=given.data_groups,
        sequence_parallel=given.shared,
        accumulation=given.accumulation,
        rows=train.global_batch,
        empty_rows=rows - train.global_batch,
        tokens=train.global_batch * given.row,
        reference_time_percent=round(100 * given.reference_passes / passes),
        stored_reference_percent=round(100 * stored / passes),
    )


def _host_memory(given: Inputs) -> HostMemory:
    """Return the bytes on one node.

    They are each rank's pieces in flight, the base's partitions and the optimizer's states if the policy offloads them,
    with one more gradient and what the update takes. The inputs of offloaded layers, the copies of learning parameters
    from which checkpoints are uploaded, those of the last updates that a keeper has, and pictures that are read ahead,
    come on top.
    """
    ranks = min(given.ranks_per_node, given.world_size)
    reads, offloaded, states = (ranks * size for size in (_READ_BYTES, offloaded_base(given), offloaded_states(given)))
    inputs = ranks * offloaded_activations(given)
    copies = ceil(ranks * given.checkpoint_bytes / given.world_size)
    if given.on_gpu:  # a pinned block on each rank (trainer/state/checkpoint/checkpoints.py)
        copies = ranks * pinned_bytes(ceil(given.checkpoint_bytes / given.world_size))
    of_update = ceil(ranks * given.checkpoint_bytes / given.world_size)
    kept = 2 * of_update if given.config.cluster.keeper else 0
    if copies_updates(given.config) and ranks < given.world_size:  # two of another machine's, and one that arrives
        kept += 3 * of_update
    data = given.config.data
    ahead = ranks * data.images.read_ahead if ROW_KINDS[data.kind].sees else 0
    parts = (reads, offloaded, states, inputs, copies, kept, ahead)
    return HostMemory(*parts, sum(parts))


def _traffic(given: Inputs) -> Traffic:
    """Return the bytes that one rank receives in a step.

    From the W ranks of a group come (W - 1) / W of what is gathered.

    The base is gathered in the forward and in the backward pass of every micro-batch. Activations are recomputed within
    the backward pass. A pass through the reference and a survey gather the base once more each. Ranks that share rows
    exchange queries, keys, values and results of attention in each pass through a layer, on their node. Learning
    parameters, adapters or the base itself, are gathered as often, except for the reference. Their gradients are
    reduce-scattered in fp32 after every micro-batch; DeepSpeed does not wait for the last.
    """
    world_size, group = given.world_size, given.group
    passes = 2 * given.accumulation
    surveys = int(given.survey is not None)
    base_passes = passes + given.accumulation * (given.reference_passes + surveys)

    frozen = base_bytes(given) - given.item * given.learning_base
    base = base_passes * frozen * (group - 1) // group
    # A small parameter that learns is whole everywhere and gathered once, after its update.
    learning = given.small + (passes + given.accumulation * surveys) * (given.trainable - given.small)
    adapters = given.item * learning * (world_size - 1) // world_size
    gradients = given.accumulation * 4 * given.trainable * (world_size - 1) // world_size

    far = max(0, world_size - given.ranks_per_node)
    crossing = (adapters + gradients) * far // max(1, world_size - 1)
    if given.scope == "world":
        crossing += base * far // max(1, world_size - 1)
    exchanged = _exchanged(given)
    return Traffic(base, adapters, gradients, exchanged, base + adapters + gradients + exchanged, crossing)


def _exchanged(given: Inputs) -> int:
    """Return the bytes that a rank receives from the others that share its rows.

    They come in the forward and the backward pass of each layer, and again if the layer is recomputed. A rank sends all
    values of its tokens but its own part to the others, and receives as many.
    """
    layers = given.model.layers
    again = 1 - given.kept_layers / layers
    passes = given.accumulation * (2 + again)
    values = exchanged_values(given.model, given.shared)
    return ceil(given.item * passes * given.tokens * values * (given.shared - 1) / given.shared)


def _shortfalls(given: Inputs, needed: int, gpu_memory: int | None) -> Iterator[str]:
    if uneven := uneven_ranks(given.shared, given.world_size, given.ranks_per_node):
        yield uneven
    if given.scope == "node" and given.world_size % min(given.ranks_per_node, given.world_size):
        yield (
            f"sharding.scope: node needs as many ranks on every node, but {given.world_size} ranks are not a multiple"
            f" of {given.ranks_per_node} a node. Change cluster.workers, or set sharding.scope: world."
        )
    if gpu_memory is not None and needed > gpu_memory:
        yield (
            f"memory: {needed / 2**30:.1f} GiB are needed on each GPU, {gpu_memory / 2**30:.1f} GiB are there. "
            f"{_remedy(given)}"
        )


def _remedy(given: Inputs) -> str:
    """Return the first thing to change when memory does not suffice."""
    config = given.config
    if given.kept_layers:
        return "Set train.activation_checkpointing: auto."
    if not config.quant.held.packs and not given.method.exports_model:
        return "Set quant.type: nf4."
    if given.method.exports_model and not given.states_offloaded:
        return "Use more GPUs, set optim.name: adamw_8bit, or sharding.deepspeed: zero3_offload_optimizer."
    if given.scope == "node":
        return "Set sharding.scope: world, or use more GPUs a node."
    if not given.offloaded:
        return "Use more GPUs, lower data.sequence_length, or set sharding.deepspeed: zero3_offload_cpu."
    return "Use more GPUs, or lower data.sequence_length."
