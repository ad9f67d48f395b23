"""The needs of a run, by arithmetic: parameters, memory, batch, traffic. No GPU, no torch, nothing downloaded.

Everything that does not fit or does not match is reported at once, in `Plan.shortfalls`. Counts of parameters and bytes
of stored tensors are exact; activations, gathered layers and host memory are estimates, by the formulas stated at each
function.
"""

from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from typing import Any

from trainer.base.activations import layer_values
from trainer.base.architecture import Architecture
from trainer.base.base import Description
from trainer.config import Config
from trainer.needs import GlobalBatch, GpuMemory, HostMemory, Parameters, Plan, Traffic
from trainer.objective.objective import Survey, find_objective, objective_mismatches, reference_of, segments_of
from trainer.optimizer.optimizer import State, find_optimizer, states_by_name
from trainer.sizes import most_whole, stored_layers, value_bytes
from trainer.tuning.method import method_of, stored_mismatches, tuning_mismatches
from trainer.zero.policy import Scope, build_deepspeed_config, is_offloaded

# trainer/model/experts.py: bytes of a mixture's experts that are dequantized at once.
_EXPERTS_BYTES = 2**29
# trainer/model/head.py: bytes of fp32 logits computed at once.
_LOGITS_CHUNK_BYTES = 2**28
# trainer/zero/gather.py: layers that are whole on a GPU at one time.
_LAYERS_GATHERED = 3
# trainer/base/reading.py: pieces of the base read ahead and the one that is quantized, each twice while it is handed over.
_READ_BYTES = 2 * 9 * 4 * 2**20
# CUDA's context and the allocator's slack, and the buffers of an NCCL communicator: 16 channels of 4 MiB (NCCL_BUFFSIZE) to
# send and to receive. Allowances, not measurements.
_CONTEXT_BYTES = 3 * 2**28
_COMMUNICATOR_BYTES = 2**27


@dataclass(frozen=True)
class _Inputs:
    """The formulas' inputs. `group` ranks hold one copy of the base; `item` is the bytes of a 16- or 32-bit value."""

    config: Config
    model: Architecture
    zero: dict[str, Any]
    world_size: int
    ranks_per_node: int
    accumulation: int
    scope: Scope

    @property
    def group(self) -> int:
        return self.world_size if self.scope == "world" else min(self.ranks_per_node, self.world_size)

    @property
    def item(self) -> int:
        return value_bytes(self.config)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter that learns, by name: of the adapters, or of the base itself."""
        return method_of(self.config).shapes(self.model)

    @cached_property
    def learning(self) -> dict[str, int]:
        """Elements of each of them."""
        return {name: prod(shape) for name, shape in self.shapes.items()}

    @cached_property
    def checkpoint_bytes(self) -> int:
        """Bytes of the fp32 masters and of the optimizer's states."""
        every = ((state, self.learning[name]) for name, states in self.states.items() for state in states)
        return sum(state.item * state.size(numel) for state, numel in every)

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of the same on one rank, which has vectors whole, and the fp32 gradient that it adds up."""
        every = (state for states in self.states.values() for state in states)
        vectors = sum(state.item * state.length for state in every if state.length is not None)
        return ceil((self.checkpoint_bytes - vectors) / self.world_size) + vectors + 4 * self.share

    @cached_property
    def states(self) -> dict[str, tuple[State, ...]]:
        """The masters and the optimizer's states of each parameter that learns, by name."""
        return states_by_name(self.config.optim.name, self.shapes)

    @property
    def trainable(self) -> int:
        return sum(self.learning.values())

    @cached_property
    def small(self) -> int:
        """Elements of what learns that stay whole on every rank, in parameters under ZeRO-3's persistence threshold."""
        threshold = self.zero["stage3_param_persistence_threshold"]
        return sum(size for size in self.learning.values() if size <= threshold)

    @property
    def share(self) -> int:
        """Elements of what learns that one rank has."""
        return ceil(self.trainable / self.world_size)

    @cached_property
    def learning_base(self) -> int:
        """Elements of the base's own parameters that learn; these are stored in 16 or 32 bits."""
        return sum(parameter.numel for parameter in self.model.parameters if parameter.name in self.learning)

    @cached_property
    def reference_passes(self) -> int:
        """Forward passes of a micro-batch through the reference."""
        return int(reference_of(self.config) == "adapter_off")

    @cached_property
    def survey(self) -> Survey | None:
        """The objective's forward pass of each micro-batch before the losses of a step, if it needs one."""
        return find_objective(self.config).survey

    @property
    def row(self) -> int:
        """Positions of a packed row, with those that are reserved for a method's virtual tokens (trainer/data/order.py)."""
        data = self.config.data
        return data.sequence_length + segments_of(self.config) * method_of(self.config).virtual.reserved

    @property
    def states_offloaded(self) -> bool:
        return self.zero.get("offload_optimizer", {}).get("device", "none") != "none"

    @property
    def offloaded(self) -> bool:
        return is_offloaded(self.zero)

    @property
    def communicators(self) -> int:
        """NCCL's: all ranks have two, as DeepSpeed clones theirs, and those of a node one where they share a copy of the base."""
        return 2 * (self.world_size > 1) + (1 < self.group < self.world_size)


def make_plan(config: Config, base: Description, world_size: int, ranks_per_node: int, gpu_memory: int | None) -> Plan:
    """Plan a run on `world_size` ranks, `ranks_per_node` of them on each node.

    Args:
        base: what config.json says of it.
        gpu_memory: bytes of one GPU; None when there is none to compare with.

    Raises:
        ConfigError: the method, the objective or the optimizer is unknown, or the DeepSpeed policy cannot be used.
    """
    scope = choose_scope(config, base.architecture, world_size, ranks_per_node, gpu_memory)
    given, deepspeed = _inputs(config, base.architecture, world_size, ranks_per_node, scope)
    memory = _gpu_memory(given)
    method = [*tuning_mismatches(config, given.model), *stored_mismatches(config, base.stored)]
    wrong = [*base.mismatches(config), *method, *objective_mismatches(config)]
    return Plan(
        parameters=_parameters(given),
        batch=_batch(given),
        memory_per_gpu=memory,
        memory_per_host=_host_memory(given),
        traffic_per_step=_traffic(given),
        checkpoint_bytes=given.checkpoint_bytes,
        scope=scope,
        device="cpu" if config.cluster.gpus_per_worker == 0 else "gpu",
        deepspeed=deepspeed,
        mismatches=wrong,
        shortfalls=[*wrong, *_shortfalls(given, memory.total, gpu_memory)],
    )


def choose_scope(
    config: Config, model: Architecture, world_size: int, ranks_per_node: int, gpu_memory: int | None
) -> Scope:
    """`sharding.scope`, with auto decided: node where there are several, all alike, and a GPU is known to hold its part
    of a whole base a node; then no frozen weight crosses the network. Otherwise world, as where the base itself learns."""
    if config.sharding.scope != "auto":
        return config.sharding.scope
    if method_of(config).trains_base:
        return "world"
    if gpu_memory is None or world_size <= ranks_per_node or world_size % ranks_per_node:
        return "world"
    given, _ = _inputs(config, model, world_size, ranks_per_node, "node")
    return "node" if _gpu_memory(given).total <= gpu_memory else "world"


def _inputs(
    config: Config, model: Architecture, world_size: int, ranks_per_node: int, scope: Scope
) -> tuple[_Inputs, dict[str, Any]]:
    """The formulas' inputs, and DeepSpeed's dictionary."""
    accumulation = ceil(config.train.global_batch / (world_size * config.train.micro_batch))
    on_gpu = config.cluster.gpus_per_worker != 0
    deepspeed = build_deepspeed_config(config, world_size, accumulation, on_gpu, most_whole(config, model))
    zero = deepspeed["zero_optimization"]
    return _Inputs(config, model, zero, world_size, ranks_per_node, accumulation, scope), deepspeed


def _parameters(given: _Inputs) -> Parameters:
    weights = given.model.weights
    embedding, linear, small = weights("embedding", "head"), weights("linear", "experts"), weights("small")
    frozen = embedding + linear + small - given.learning_base
    return Parameters(embedding, linear, small, frozen, given.trainable, frozen + given.trainable)


def _batch(given: _Inputs) -> GlobalBatch:
    """Time is counted in passes: with frozen weights a backward pass makes as many products as a forward pass, and twice as
    many where they learn; activation checkpointing repeats the forward pass. A survey takes some of the tokens, one forward pass
    each, and leaves the loss the others."""
    train = given.config.train
    rows = given.accumulation * given.world_size * train.micro_batch
    surveyed = given.survey.share if given.survey else 0
    of_loss = 2 + train.activation_checkpointing + method_of(given.config).trains_base
    passes = surveyed + (1 - surveyed) * of_loss
    stored = reference_of(given.config) == "stored"
    return GlobalBatch(
        world_size=given.world_size,
        accumulation=given.accumulation,
        rows=train.global_batch,
        empty_rows=rows - train.global_batch,
        tokens=train.global_batch * given.row,
        reference_time_percent=round(100 * given.reference_passes / passes),
        stored_reference_percent=round(100 * stored / passes),
    )


def _layer_bytes(given: _Inputs) -> list[int]:
    """Bytes of the linear weights and experts of each decoder layer as they are stored."""
    return stored_layers(given.config, given.model)


def _base_bytes(given: _Inputs) -> int:
    """Bytes of one whole copy of the base as it is stored."""
    return sum(_layer_bytes(given)) + given.item * given.model.weights("embedding", "head", "small")


def _gpu_memory(given: _Inputs) -> GpuMemory:
    """Bytes on one GPU.

    What is frozen: its stored bytes / the ranks that share one copy, nothing where it is offloaded.
    What learns, adapters or the base itself: the 16-bit partition and, where a parameter is under ZeRO-3's persistence
    threshold, a whole copy; then fp32 master, the optimizer's states and accumulated gradient (with AdamW 16 bytes an
    element) / world size.
    """
    config, model, world_size = given.config, given.model, given.world_size
    linear = sum(_layer_bytes(given))
    unquantized = given.item * model.weights("embedding", "head", "small")
    if config.quant.type == "none":
        linear, unquantized = 0, unquantized + linear
    unquantized -= given.item * given.learning_base
    whole = given.small if world_size > 1 else 0
    dequantized = 0 if config.quant.type == "none" else _dequantized(given)
    passes = {
        "gathered_layers": _gathered(given),
        "dequantized_weight": dequantized,
        "whole_gradient": (4 + given.item) * max(given.learning.values(), default=0),
        "activations": _activations(given),
        "logits": _logits(given),
    }
    parts = {
        "frozen_quantized": 0 if given.offloaded else ceil(linear / given.group),
        "frozen_unquantized": 0 if given.offloaded else ceil(unquantized / given.group),
        "adapter_weights": given.item * (whole + given.share),
        "adapter_states": 0 if given.states_offloaded else given.state_bytes,
        "gradient_buckets": _gradient_buckets(given),
        **passes,
        "optimizer_step": 0 if given.states_offloaded else max(0, _optimizer_step(given) - sum(passes.values())),
        "context": _CONTEXT_BYTES,
        "communicators": given.communicators * _COMMUNICATOR_BYTES,
    }
    return GpuMemory(**parts, total=sum(parts.values()))


def _dequantized(given: _Inputs) -> int:
    """Bytes of the 4-bit weights that are in 16 bits at one moment: one matrix, or as many of a mixture's experts as are
    multiplied at once."""
    return max(
        max(given.item * parameter.matrices[0], min(_EXPERTS_BYTES, given.item * parameter.numel))
        for parameter in given.model.parameters
        if parameter.kind in ("linear", "experts")
    )


def _optimizer_step(given: _Inputs) -> int:
    """Bytes that the update takes when the passes have freed theirs, for one sub-group of DeepSpeed's at a time."""
    portion = min(given.share, given.zero.get("sub_group_size", 1_000_000_000))
    largest = ceil(max(given.learning.values(), default=0) / given.world_size)
    on_gpu = given.config.cluster.gpus_per_worker != 0 and not given.states_offloaded
    return find_optimizer(given.config.optim).step_bytes(portion, largest, on_gpu)


def _gathered(given: _Inputs) -> int:
    """Bytes of the base's parameters that are whole on a GPU at one moment, as trainer/zero/gather.py gathers them.

    In the middle the layer that the device computes, the next one, which the host has come to, and the flat buffer that this one
    came in and the one behind it is gathered into. At the turn from forward to backward the head and the layer before it. What the
    policy keeps within stage3_max_reuse_distance comes on top, half of it on either side of the turn. Never more than the whole
    base; nothing when a partition is the whole parameter.
    """
    if given.group == 1 and not given.offloaded:
        return 0
    layer = max(_layer_bytes(given))
    turn = given.item * given.model.largest("embedding", "head") + layer
    # A quantized parameter is made of bytes, any other of 16- or 32-bit values.
    element_bytes = given.item if given.config.quant.type == "none" else 1
    kept = given.zero.get("stage3_max_reuse_distance", 0) // 2 * element_bytes
    return min(_base_bytes(given), max(_LAYERS_GATHERED * layer, turn) + kept)


def _gradient_buckets(given: _Inputs) -> int:
    """Bytes of DeepSpeed's bucket of fp32 gradients, and of the flat copies that it reduces the bucket from and to."""
    bucket = given.zero.get("reduce_bucket_size", 500_000_000)
    reduced = min(bucket, given.trainable) if given.world_size > 1 else 0
    return 4 * (bucket + reduced + ceil(reduced / given.world_size))


def _activations(given: _Inputs) -> int:
    """Bytes of activations of one micro-batch of T tokens, with an attention kernel that keeps no score matrix.

    Counted as Korthikanti et al. do (arXiv:2205.05198, section 4), with frozen linear layers; see trainer/base/activations.py.
    Checkpointing keeps the hidden state of each layer, and the largest layer's values while it is recomputed. On top come the
    widest gradients: a hidden state, and two of what enters the last linear layer of a block.
    """
    model, config = given.model, given.config
    tokens = config.train.micro_batch * given.row
    layers = [layer_values(model, layer) for layer in range(model.layers)]
    every = [layer.kept for layer in layers]
    kept = model.layers * model.hidden + max(every) if config.train.activation_checkpointing else sum(every)
    return ceil(given.item * tokens * (kept + 2 * max(layer.widest for layer in layers) + model.hidden))


def _logits(given: _Inputs) -> int:
    """Bytes of the chunked loss: logits of n tokens in 16 bits, in fp32, and again in 16 bits as a gradient; and the
    gradient of the hidden states of all T tokens."""
    model, config = given.model, given.config
    tokens = config.train.micro_batch * given.row
    chunk = min(tokens, max(1, _LOGITS_CHUNK_BYTES // (4 * model.vocabulary)))
    return chunk * model.vocabulary * (4 + 2 * given.item) + given.item * tokens * model.hidden


def _host_memory(given: _Inputs) -> HostMemory:
    """Bytes on one node: each rank's pieces in flight, the base's partitions and the optimizer's states where the policy
    offloads them, with one more gradient and what the update takes, and the copies of what learns that checkpoints are uploaded from."""
    ranks = min(given.ranks_per_node, given.world_size)
    reads = ranks * _READ_BYTES
    offloaded = ranks * ceil(_base_bytes(given) / given.group) if given.offloaded else 0
    states = ranks * (given.state_bytes + 4 * given.share + _optimizer_step(given)) if given.states_offloaded else 0
    copies = ceil(ranks * given.checkpoint_bytes / given.world_size)
    return HostMemory(reads, offloaded, states, copies, reads + offloaded + states + copies)


def _traffic(given: _Inputs) -> Traffic:
    """Bytes one rank receives in a step; from the W ranks of a group come (W - 1) / W of what is gathered.

    The base is gathered in the forward and in the backward pass of every micro-batch, within which activations are recomputed. A
    pass through the reference and a survey gather it once more each.
    What learns, adapters or the base itself, is gathered as often, but for the reference. Its gradients are reduce-scattered in fp32 after every micro-batch; DeepSpeed does not wait for the last.
    """
    world_size, group = given.world_size, given.group
    passes = 2 * given.accumulation
    surveys = int(given.survey is not None)
    base_passes = passes + given.accumulation * (given.reference_passes + surveys)

    frozen = _base_bytes(given) - given.item * given.learning_base
    base = base_passes * frozen * (group - 1) // group
    # A small parameter that learns is whole everywhere and gathered once, after its update.
    learning = given.small + (passes + given.accumulation * surveys) * (given.trainable - given.small)
    adapters = given.item * learning * (world_size - 1) // world_size
    gradients = given.accumulation * 4 * given.trainable * (world_size - 1) // world_size

    far = max(0, world_size - given.ranks_per_node)
    crossing = (adapters + gradients) * far // max(1, world_size - 1)
    if given.scope == "world":
        crossing += base * far // max(1, world_size - 1)
    return Traffic(base, adapters, gradients, base + adapters + gradients, crossing)


def _shortfalls(given: _Inputs, needed: int, gpu_memory: int | None) -> list[str]:
    found = list[str]()
    if given.scope == "node" and given.world_size % min(given.ranks_per_node, given.world_size):
        found.append(
            f"sharding.scope: node needs as many ranks on every node, but {given.world_size} ranks are not a multiple of "
            f"{given.ranks_per_node} a node. Change cluster.workers, or set sharding.scope: world."
        )
    if gpu_memory is not None and needed > gpu_memory:
        found.append(
            f"memory: {needed / 2**30:.1f} GiB are needed on each GPU, {gpu_memory / 2**30:.1f} GiB are there. "
            f"{_remedy(given)}"
        )
    return found


def _remedy(given: _Inputs) -> str:
    """The first thing to change when memory does not suffice."""
    config = given.config
    if not config.train.activation_checkpointing:
        return "Set train.activation_checkpointing: true."
    if config.quant.type == "none" and not method_of(config).exports_model:
        return "Set quant.type: nf4."
    if method_of(config).exports_model and not given.states_offloaded:
        return "Use more GPUs, set optim.name: adamw_8bit, or sharding.deepspeed: zero3_offload_optimizer."
    if given.scope == "node":
        return "Set sharding.scope: world, or use more GPUs a node."
    if not given.offloaded:
        return "Use more GPUs, lower data.sequence_length, or set sharding.deepspeed: zero3_offload_cpu."
    return "Use more GPUs, or lower data.sequence_length."
