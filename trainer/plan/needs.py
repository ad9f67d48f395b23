"""The needs of a run in numbers, as `trainer/plan/plan.py` counts them and `capstan plan --json` prints them."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from trainer.base.find.check import LeftOutPart
from trainer.state.zero.policy import Scope


@dataclass(frozen=True)
class Parameters:
    """Elements of the model.

    The base is embedding + linear + small (norms and biases). `frozen` is the part of it that does not learn.
    `trainable` are adapters or the other part of the base.
    """

    embedding: int
    linear: int
    small: int
    frozen: int
    trainable: int
    total: int


@dataclass(frozen=True)
class WholeWeights:
    """Matrices that could be quantized by their form and are not.

    They have the last name of their module, the reason why they stay as they are, and their elements and bytes.
    """

    name: str
    reason: str
    weights: int
    bytes: int


@dataclass(frozen=True)
class GlobalBatch:
    """One optimizer step.

    Attributes:
        data_groups: the ranks that have rows of their own, or the groups of `sequence_parallel` ranks that share rows.
        empty_rows: rows without targets, which are computed because global_batch does not divide evenly.
        reference_time_percent: the time of the objective's passes through the reference, as a share of the others'.
        stored_reference_percent: if the reference is stored, the time of the one pass before the first step, as a share
            of an epoch's.
    """

    world_size: int
    data_groups: int
    sequence_parallel: int
    accumulation: int
    rows: int
    empty_rows: int
    tokens: int
    reference_time_percent: int
    stored_reference_percent: int


ESTIMATES = (
    "gathered_layers",
    "whole_gradient",
    "activations",
    "tower_activations",
    "logits",
    "optimizer_step",
    "reads_during_load",
    "offloaded_states",
    "offloaded_activations",
)
"""Parts of the memory that follow from formulas of what is there at one moment; those of stored tensors are counted."""
ALLOWANCES = ("context", "communicators")
"""Parts that nothing counts: they are set by experience."""


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on one GPU at the peak of a step. Parts in `ESTIMATES` and `ALLOWANCES` are not counted exactly."""

    frozen_quantized: int
    frozen_unquantized: int
    frozen_whole: int
    frozen_tower: int
    gathered_layers: int
    dequantized_weight: int
    adapter_weights: int
    adapter_states: int
    whole_gradient: int
    gradient_buckets: int
    activations: int
    tower_activations: int
    logits: int
    optimizer_step: int
    context: int
    communicators: int
    total: int


@dataclass(frozen=True)
class HostMemory:
    """Bytes of host memory on one node, without the Python processes themselves."""

    reads_during_load: int
    offloaded_base: int
    offloaded_states: int
    offloaded_activations: int
    checkpoint_copy: int
    kept_updates: int
    pictures_read_ahead: int
    total: int


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank receives in one optimizer step.

    `from_other_nodes` is the part of `total` that crosses nodes.
    """

    base_gathers: int
    adapter_gathers: int
    adapter_gradients: int
    row_exchanges: int
    total: int
    from_other_nodes: int


@dataclass(frozen=True)
class Plan:
    """The needs of a run.

    Attributes:
        scope: `sharding.scope`, with auto decided.
        recomputed_layers: so many of the `layers`, from the first on, are computed again in the backward pass.
        device: what the ranks are planned for; the CPU only if `cluster.gpus_per_worker` is 0.
        shortfalls: a sentence for each thing that does not fit.
        mismatches: those shortfalls that ask more of the base than it has, on any machine.
        left_out: the parts of the base's files that are not trained, if the files are at hand.
        notes: sentences on settings without an effect.
        whole: the matrices that the quantization leaves as they are.
        unrecognised: sentences on what config.json names and the sizes lack; with any of them nobody can say whether
            the run fits.
    """

    parameters: Parameters
    batch: GlobalBatch
    memory_per_gpu: GpuMemory
    memory_per_host: HostMemory
    traffic_per_step: Traffic
    checkpoint_bytes: int
    scope: Scope
    layers: int
    recomputed_layers: int
    device: Literal["gpu", "cpu"]
    deepspeed: dict[str, Any]
    mismatches: list[str]
    shortfalls: list[str]
    left_out: list[LeftOutPart] = field(default_factory=list[LeftOutPart])
    notes: list[str] = field(default_factory=list[str])
    whole: list[WholeWeights] = field(default_factory=list[WholeWeights])
    unrecognised: list[str] = field(default_factory=list[str])

    def to_json(self) -> dict[str, Any]:
        """Return a tree of plain values. Bytes and elements are whole numbers."""
        return asdict(self)
