"""How long a run is and how long it takes, before it has begun: epochs, tokens, steps, time and money. No torch.

Time is an estimate. It rests on a rate, which was measured in a run, or on an assumed share of the GPU's peak.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil
from operator import mul
from typing import Any

from trainer.base.architecture import Architecture
from trainer.config import Config
from trainer.data.compile.length import EpochLength
from trainer.data.order.settings import steps_of_epochs
from trainer.plan.flops import StepWork, work_of
from trainer.plan.gpus import Gpu
from trainer.plan.inputs import held_as, is_packed, stored_bytes, value_bytes
from trainer.plan.needs import GlobalBatch, Traffic
from trainer.tuning.method import method_of

# The share of its memory's peak that a GPU reaches in operators that only move numbers.
_OF_BANDWIDTH = 0.9
# The share of its peak that a GPU reaches in products of matrices by themselves.
_OF_PRODUCTS = 0.65
# Seconds of the host for a kernel, and kernels of a layer and forward pass.
_LAUNCH, _LAUNCHES = 5e-6, 80
NETWORK = 45e9
"""Bytes a second that a GPU gets from other nodes: 90 % of a network card of 400 Gb/s for each."""
# The share of a GPU's peak in bf16 that a step is assumed to reach. By the arithmetic of its kernels an H100 reaches 35
# to 40 %.
UTILISATION = 0.3


@dataclass(frozen=True)
class Length:
    """How much a run trains. None stands for what cannot be known.

    `tokens` are those of its documents in all its `epochs`, `tokens_of_epoch` those of one epoch. `counted` says that
    the steps are those that the run will take. `compiled` says that the tokens are counted rather than estimated from
    `file_bytes`.
    """

    steps: int | None
    epochs: float | None
    tokens: int | None
    tokens_of_epoch: int | None
    counted: bool
    compiled: bool
    file_bytes: int
    steps_of_epoch: int | None = None  # of the first epoch


@dataclass(frozen=True)
class Rate:
    """The seconds that a rank (or the ranks that share it) takes for one packed row, and their source.

    The source is a run of the store and its GPU, or an assumption. `tokens_per_second` are those of a rank.
    """

    seconds_a_row: float
    tokens_per_second: float
    basis: str
    run: str | None = None


@dataclass(frozen=True)
class GatherTraffic:
    """The traffic that a rank receives in a step of `passes` micro-batches, on `nodes` nodes of so many ranks each."""

    traffic: Traffic
    passes: int
    nodes: int
    ranks: int

    def seconds(self, gpu: Gpu) -> float:
        """Return the time of a micro-batch's gathers, within the node and between nodes at the same time.

        Collectives pass what they gather around in a ring: all of it enters each node, once, through the network cards
        of all ranks.
        """
        around = self.traffic.from_other_nodes * self.nodes / max(1, self.nodes - 1)
        return max(self.traffic.total / gpu.link, around / (self.ranks * NETWORK)) / self.passes


@dataclass(frozen=True)
class PictureWork:
    """The cost of a run's pictures, videos and sounds beside its language model. It was measured with files of `sizes`:
    height and width, or the two numbers that the index keeps of a video or a sound.

    Attributes:
        share: the share of the tokens that stand for pictures; None before the data is compiled.
        tokens: those of a picture, on average.
        operations: those of the tower, for each of these tokens, with those of its backward pass if it has
            adapters; None if they cannot be counted.
        seconds: those of a core of the machine that plans, for each of these tokens.
        cores: so many cores read pictures for a rank.
        of: the first of those that it was measured with, for a reader; "file" if they are of several kinds.
        smaller_by: the settings that make such files smaller.
    """

    sizes: tuple[tuple[int, int], ...]
    share: float | None
    tokens: float
    operations: float | None
    seconds: float
    cores: int
    of: str = "picture"
    smaller_by: tuple[str, ...] = ()

    @property
    def noun(self) -> str:
        """The word for such files in messages: pictures, videos, sounds or files."""
        return f"{self.of.partition(' ')[0]}s"

    def operations_of_row(self, tokens: int) -> float:
        """Each rank puts the whole row together, also if ranks share it."""
        return tokens * (self.share or 0.0) * (self.operations or 0.0)

    def host_seconds_of_row(self, tokens: int) -> float:
        """The time in which the cores of a rank read the pictures of a row."""
        return tokens * (self.share or 0.0) * self.seconds / self.cores


def together(works: Sequence[PictureWork]) -> PictureWork:
    """The cost of all files of a run. `works` are those of its pictures, videos and sounds, of each that it has."""
    if len(works) == 1:
        return works[0]
    shares = [work.share or 0.0 for work in works]
    share, files = sum(shares), sum(share / work.tokens for share, work in zip(shares, works, strict=True))
    counted = [work.operations for work in works if work.operations is not None]
    return PictureWork(
        tuple(size for work in works for size in work.sizes),
        share,
        share / files,
        sum(map(mul, shares, counted)) / share if len(counted) == len(works) else None,
        sum(share * work.seconds for share, work in zip(shares, works, strict=True)) / share,
        works[0].cores,
        "file",
        tuple(setting for work in works for setting in work.smaller_by),
    )


@dataclass(frozen=True)
class Forecast:
    """An estimate of a run's time and cost.

    It covers only the steps, without loading, evaluations, commits and the waiting of ranks.
    """

    step_seconds: float
    seconds: float
    gpu_hours: float | None
    cost: float | None
    tokens_per_second: float
    basis: str
    run: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def length_of(config: Config, epoch: EpochLength | None) -> Length:
    """Return the length of the run, whose training data has epochs of this length."""
    train, rows = config.train, epoch.rows if epoch else None
    steps, epochs, counted = train.steps, train.epochs, train.steps is not None
    if train.epochs and epoch and rows:
        wanted = ceil(train.epochs)
        counted = len(epoch.bins) >= wanted
        bins = epoch.bins[:wanted] if counted else [rows] * wanted
        steps = sum(steps_of_epochs(bins, Fraction(str(train.epochs)), train.global_batch))
    if steps and epochs is None and rows:
        epochs = steps / ceil(rows / train.global_batch)
    tokens = round(epochs * epoch.tokens) if epochs and epoch else None
    found = (epoch.tokens, epoch.compiled, epoch.file_bytes) if epoch else (None, False, 0)
    first = epoch.bins[0] if epoch and epoch.bins else rows
    return Length(steps, epochs, tokens, found[0], counted, *found[1:], first and ceil(first / train.global_batch))


def assumed_rate(
    config: Config,
    model: Architecture,
    gpu: Gpu,
    recomputed: float,
    gathers: GatherTraffic | None = None,
    pictures: PictureWork | None = None,
) -> Rate | None:
    """Return the rate at which this GPU would compute, at the assumed utilisation. None if its peak is not known.

    This share of the layers is computed again. A row takes the time of the slowest of those that go on beside each
    other: the device, its gathers, the host, and the host's cores that read pictures.
    """
    if gpu.flops is None or config.model.dtype != "bf16":
        return None
    reached = UTILISATION * gpu.flops
    tokens, rows, shared = config.data.sequence_length, config.train.micro_batch, config.sharding.sequence_parallel
    work = work_of(config, model, recomputed, gpu.name)
    experts = _experts_seconds(config, model, gpu, work)
    by_share = work.of_row(tokens) - (tokens * work.experts if experts else 0.0)
    others = {
        "gathers": gathers.seconds(gpu) / rows if gathers else 0.0,
        "the host's launches": _LAUNCH * _LAUNCHES * model.layers * work.products / rows,
        "cores of the host that read pictures": pictures.host_seconds_of_row(tokens) if pictures else 0.0,
    }
    seconds = by_share / reached / shared + experts + _moving_seconds(config, model, gpu, work)
    seconds += pictures.operations_of_row(tokens) / reached if pictures else 0.0
    slowest = max(others, key=others.__getitem__)
    basis = (
        f"{reached / 1e12:,.0f} TFLOP/s on each GPU: {UTILISATION:.0%} of the {gpu.flops / 1e12:,.0f} that the data"
        f" sheet of {gpu.name} says for bf16. The share is assumed, not measured"
    )
    if experts:
        basis += f". Experts take {experts / seconds:.0%} of the time, by their bytes and products"
    if others[slowest] > seconds:
        basis += f". The device waits for {slowest}, {1 - seconds / others[slowest]:.0%} of the time"
        seconds = others[slowest]
    return Rate(seconds, tokens / seconds / shared, basis)


def _moving_seconds(config: Config, model: Architecture, gpu: Gpu, work: StepWork) -> float:
    """Return the seconds of each row in which a run through codes moves the codes of all weights that it adapts."""
    if not gpu.bandwidth or not method_of(config).through:
        return 0.0
    moved = sum(held_as(part, config.quant).moving_traffic * part.numel for part in model.parameters)
    return work.products * moved / (_OF_BANDWIDTH * gpu.bandwidth) / config.train.micro_batch


def _experts_seconds(config: Config, model: Architecture, gpu: Gpu, work: StepWork) -> float:
    """Return the time of a row for the experts of mixtures, 0 without any or if the memory's speed is not known.

    Each rank decodes all experts in each pass of a micro-batch, however few rows they get. Then their products take as
    long as their operations or, with few rows an expert, as reading the matrices. Elementwise work is counted by what
    the kernels of trainer/model/kernels/mixture.py move, of each row that goes to an expert. Other weights have as much
    work as rows, so that decoding and elementwise work are a part of the assumed share.
    """
    stacks = [part for part in model.parameters if part.kind == "experts"]
    if not stacks or not gpu.bandwidth or gpu.flops is None:
        return 0.0
    item, speed = value_bytes(config), _OF_BANDWIDTH * gpu.bandwidth
    tokens, rows, shared = config.data.sequence_length, config.train.micro_batch, config.sharding.sequence_parallel
    packed = [part for part in stacks if is_packed(part, config.quant)]
    decoded = sum(stored_bytes(part, config.quant, item) + item * part.numel for part in packed)
    read = work.products * item * sum(part.numel for part in stacks) / speed
    products = max(rows * tokens * work.experts / shared / (_OF_PRODUCTS * gpu.flops), read)
    # The values that its matrices read or make for each row: a hidden state, and the inner width, once or as a pair.
    inner = {part.name: part.visits * part.numel / model.hidden for part in stacks}
    layers = {part.layer: part.visits * part.shape[0] for part in stacks}
    forward = sum(inner.values()) + 2 * model.hidden * sum(layers.values())
    backward = 5 / 3 * sum(inner.values()) + 2 * model.hidden * sum(layers.values())
    values = (work.products - 1) * forward + backward
    return (work.products * decoded / speed + products) / rows + item * values * tokens / shared / speed


def forecast(
    config: Config, batch: GlobalBatch, length: Length, rate: Rate | None, waiting: int = 0
) -> Forecast | None:
    """Return the time that the run takes at this rate; None if its steps or the rate are not known.

    `waiting` is the number of GPUs that wait on spare machines.
    """
    if rate is None or length.steps is None:
        return None
    step = batch.accumulation * config.train.micro_batch * rate.seconds_a_row
    seconds, price = step * length.steps, config.track.price_per_gpu_hour
    hours = None if config.cluster.gpus_per_worker == 0 else seconds * (batch.world_size + waiting) / 3600
    cost = None if hours is None or price is None else hours * price
    return Forecast(step, seconds, hours, cost, rate.tokens_per_second, rate.basis, rate.run)
