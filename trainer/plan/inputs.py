"""Facts about a run on one of so many ranks, from which plans count. No GPU, no torch.

Below them are the bytes of a base as it is stored, and which of its parameters are small enough to be whole on every
rank.
"""

import json
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trainer.base.architecture import Architecture, Parameter
from trainer.config import Config, Quant
from trainer.config.training import EXPERTS_AT_ONCE, FP8_ROWS_EACH
from trainer.errors import NOT_JSON
from trainer.model.held import HeldFormat
from trainer.model.held.formats.plain import Plain
from trainer.model.rows.heads import copies_of_keys
from trainer.plan.resolve import reference_of, value_bytes
from trainer.state.optimizer import State, states_by_name
from trainer.state.zero.policy import WHOLE, Scope, is_offloaded
from trainer.store.safetensors_index import INDEX_FILE
from trainer.tuning.method import Method, method_of
from trainer.tuning.objective import Objective, Survey, find_objective


class StoredParameter(NamedTuple):
    """A parameter of the frozen base as ZeRO-3 divides it.

    A quantized matrix is several such parameters, its codes and its scales, which consist of bytes.
    """

    elements: int
    item: int

    @property
    def bytes(self) -> int:
        return self.elements * self.item


@dataclass(frozen=True)
class Inputs:
    """The inputs of the formulas, including `deepspeed`, DeepSpeed's dictionary of settings.

    `group` ranks hold one copy of the base. `item` is the bytes of a 16- or 32-bit value. A mixture's
    experts are dequantized in groups of at most `experts_at_once` bytes.
    """

    config: Config
    model: Architecture
    deepspeed: dict[str, Any]
    world_size: int
    ranks_per_node: int
    accumulation: int
    scope: Scope
    experts_at_once: int = EXPERTS_AT_ONCE

    @property
    def zero(self) -> dict[str, Any]:
        return self.deepspeed["zero_optimization"]

    @property
    def shared(self) -> int:
        """The number of ranks that share each row."""
        return self.config.sharding.sequence_parallel

    @property
    def data_groups(self) -> int:
        """The number of rows that are computed at one time: one for each rank, or each group that shares rows."""
        return max(1, self.world_size // self.shared)

    @property
    def on_gpu(self) -> bool:
        return self.config.cluster.gpus_per_worker != 0

    @property
    def group(self) -> int:
        return self.world_size if self.scope == "world" else min(self.ranks_per_node, self.world_size)

    @property
    def item(self) -> int:
        return value_bytes(self.config)

    @cached_property
    def method(self) -> Method:
        return method_of(self.config)

    @cached_property
    def objective(self) -> Objective:
        return find_objective(self.config, self.method)

    @property
    def reference(self) -> Literal["adapter_off", "stored"] | None:
        """The source of the values with which the objective compares, if it reads any."""
        return reference_of(self.config, self.objective, self.method)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter that learns, by name: of the adapters, or of the base itself."""
        return self.method.shapes(self.model)

    @cached_property
    def learning(self) -> dict[str, int]:
        """The elements of each parameter that learns."""
        return {name: prod(shape) for name, shape in self.shapes.items()}

    @cached_property
    def checkpoint_bytes(self) -> int:
        """The bytes of the fp32 masters and of the optimizer's states."""
        every = ((state, self.learning[name]) for name, states in self.states.items() for state in states)
        return sum(state.item * state.size(numel) for state, numel in every)

    @cached_property
    def state_bytes(self) -> int:
        """The bytes of masters and states on one rank, which has vectors whole, and of its fp32 gradient sum."""
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
        """The elements of what learns that one rank holds."""
        return ceil(self.trainable / self.world_size)

    @cached_property
    def learning_base(self) -> int:
        """The elements of the base's own parameters that learn. These are stored in 16 or 32 bits."""
        return sum(parameter.numel for parameter in self.model.parameters if parameter.name in self.learning)

    @cached_property
    def frozen(self) -> list[StoredParameter]:
        """The base's parameters that do not learn, as they are stored."""
        of_base = (parameter for parameter in self.model.parameters if parameter.name not in self.learning)
        return [stored for one in of_base for stored in stored_parameters(one, self.config.quant, self.item)]

    def is_whole(self, stored: StoredParameter) -> bool:
        """Return whether a parameter is small enough to be whole on every rank.

        Such a parameter stays on the GPU when the others are offloaded.
        """
        return stored.elements <= self.zero["stage3_param_persistence_threshold"]

    @cached_property
    def reference_passes(self) -> int:
        """The forward passes of a micro-batch through the reference."""
        return int(self.reference == "adapter_off")

    @cached_property
    def survey(self) -> Survey | None:
        """The objective's forward pass of each micro-batch before the losses of a step, if it needs one."""
        return self.objective.survey

    @property
    def kept_layers(self) -> int:
        """The decoder layers, from the last one on, that keep their activations for the backward pass."""
        return self.config.train.kept_layers(self.model.layers)

    @property
    def recomputed_layers(self) -> int:
        """The decoder layers that compute their activations again."""
        return self.model.layers - self.kept_layers

    @property
    def offloads_inputs(self) -> bool:
        """Whether the inputs of recomputed layers go to the host. On a CPU they are there already."""
        return self.config.train.activation_offload and self.on_gpu

    @cached_property
    def row(self) -> int:
        """The positions of a packed row, including those reserved for a method's virtual tokens.

        See trainer/data/order/settings.py.
        """
        data = self.config.data
        return data.sequence_length + data.segments(self.objective.formats) * self.method.virtual.reserved

    @property
    def tokens(self) -> int:
        """The positions of a micro-batch that a rank computes."""
        return ceil(self.config.train.micro_batch * self.row / self.shared)

    @property
    def states_offloaded(self) -> bool:
        return self.zero.get("offload_optimizer", {}).get("device", "none") != "none"

    @property
    def offloaded(self) -> bool:
        return is_offloaded(self.zero)

    @property
    def sub_group(self) -> int:
        """The elements that one step of the update takes."""
        return self.zero.get("sub_group_size", 1_000_000_000)

    def pins(self, section: str) -> bool:
        """Return whether what this section of the policy offloads is pinned. A CPU has nothing to copy to."""
        return self.on_gpu and bool(self.zero.get(section, {}).get("pin_memory"))

    @property
    def communicators(self) -> int:
        """The number of NCCL's communicators; CPUs use gloo.

        All ranks have two, because DeepSpeed clones theirs. The ranks of a node have one more if they share a copy of
        the base, and the ranks that share rows have one more.
        """
        if not self.on_gpu:
            return 0
        return 2 * (self.world_size > 1) + (1 < self.group < self.world_size) + (self.shared > 1)


# Larger adapters are not worth their memory on every rank.
_WHOLE_BYTES = 2**29


def held_as(parameter: Parameter, quant: Quant) -> HeldFormat:
    """Return how a frozen parameter is held. Only matrices of linear layers and of experts can change their form."""
    return quant.held.of(parameter.kept) if parameter.matrices else Plain()


def is_packed(parameter: Parameter, quant: Quant) -> bool:
    """Return whether a parameter is held in fewer bits than it is computed with."""
    return held_as(parameter, quant).packs


def multiplies_in_fp8(config: Config, parameter: Parameter) -> bool:
    """Return whether the products with a frozen matrix are in FP8 (trainer/model/kernels/fp8.py). Those of experts are
    if each has enough rows, on average."""
    fits = parameter.matrices and all(size % 16 == 0 for size in parameter.shape[-2:])
    if parameter.kind == "experts":
        tokens = config.data.sequence_length * config.train.micro_batch / config.sharding.sequence_parallel
        fits = fits and tokens * parameter.visits >= FP8_ROWS_EACH
    return config.train.products == "fp8" and bool(fits) and is_packed(parameter, config.quant)


def stored_bytes(parameter: Parameter, quant: Quant, item: int) -> int:
    """Return the bytes of the matrices of one parameter, which are alike.

    If they are not quantized, a weight takes `item` bytes.
    """
    means = 4 * len(parameter.matrices) * held_as(parameter, quant).means
    stored = stored_parameters(parameter, quant, item) if parameter.matrices else []
    return means + sum(part.bytes for part in stored)


def stored_parameters(parameter: Parameter, quant: Quant, item: int) -> list[StoredParameter]:
    """Return the parameters that one of the base's becomes. An element that is not quantized takes `item` bytes."""
    form = held_as(parameter, quant)
    if not form.packs:
        return [StoredParameter(parameter.numel, item)]
    rows, columns = parameter.shape[-2:]
    return [StoredParameter(len(parameter.matrices) * size, 1) for size in form.sizes(rows, columns).values()]


def held_size(config: Config, model: Architecture) -> int:
    """Return the bytes of the whole base as the ranks together hold it."""
    item = value_bytes(config)
    return sum(part.bytes for one in model.parameters for part in stored_parameters(one, config.quant, item))


def stored_size(config: Config, model: Architecture, directory: Path | None) -> int:
    """Return the bytes of the base's files.

    The files in `directory`, or their index there, say how many. Otherwise weights count as they are published: in the
    4 or 8 bits that config.json describes, and else in 16.
    """
    if directory and config.model.layers is None:
        if files := list(directory.glob("*.safetensors")):
            return sum(file.stat().st_size for file in files)
        with suppress(OSError, *NOT_JSON, LookupError, TypeError, ValueError):
            return int(json.loads((directory / INDEX_FILE).read_bytes())["metadata"]["total_size"])
    as_stored = Quant.model_validate({"type": "stored"})
    return sum(part.bytes for one in model.parameters for part in stored_parameters(one, as_stored, 2))


def stored_layers(config: Config, model: Architecture) -> list[int]:
    """Return the bytes of the linear weights and experts of each decoder layer."""
    item = value_bytes(config)
    return [
        sum(stored_bytes(parameter, config.quant, item) for parameter in model.in_layer(layer))
        for layer in range(model.layers)
    ]


def exchanged_values(model: Architecture, size: int) -> int:
    """Return the values a token that `size` ranks which share a row exchange in a pass through all layers.

    They are queries, keys, values and results of attention, and likewise what other layers take and return. Keys and
    values count as often as ranks need them (trainer/model/rows/attention.py). Keys of an unknown form count like
    queries. A layer that each rank computes whole takes all states of the row.
    """
    found = 0
    for layer in model.attention if size > 1 else ():
        if layer.path in model.computed_whole:
            continue
        linears = (part for part in model.in_layer(layer.layer) if part.name.startswith(f"{layer.path}."))
        results = [part.shape[1] for part in linears if part.kind == "linear" and part.shape[0] == model.width]
        result = results[-1] if results else model.width
        keys = result
        if layer.key_value_heads and layer.head_size and layer.query_heads:
            keys = _copies(layer.query_heads, layer.key_value_heads, size) * layer.key_value_heads * layer.head_size
        found += 2 * result + 2 * keys
    for mixing in model.mixing if size > 1 else ():
        found += sum(one.values + one.grouped * _copies(one.heads, one.groups, size) for one in mixing.exchanges)
        found += 0 if mixing.exchanges else size * model.width
    return found


def _copies(heads: int, groups: int, size: int) -> int:
    """Return how often ranks need each group. It is once if they could not share the heads."""
    return copies_of_keys(heads, groups, size) if heads % size == 0 else 1


def copies_updates(config: Config) -> bool:
    """Return whether what learns is copied to another machine after each update: by default where little learns."""
    asked = config.cluster.copies
    return config.cluster.keeper and (not method_of(config).trains_base if asked is None else asked)


def most_whole(config: Config, model: Architecture) -> int:
    """Return the number of elements up to which parameters stay whole on every rank, if the policy does not say.

    It covers all adapters, as long as they take few bytes beside a decoder layer. Then a pass gathers nothing but the
    base, and each layer in one collective.
    """
    if method_of(config).trains_base:
        return WHOLE
    learning = [prod(shape) for shape in method_of(config).shapes(model).values()]
    few = min(_WHOLE_BYTES, max(stored_layers(config, model)))
    return max([WHOLE, *learning]) if value_bytes(config) * sum(learning) <= few else WHOLE
