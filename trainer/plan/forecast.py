"""How long a run is and how long it takes, before it has begun: epochs, tokens, steps, time and money. No torch.

Time is an estimate. It rests on a rate, which was measured in a run, or on an assumed share of the GPU's peak.
"""

from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil
from typing import Any

from trainer.base.architecture import Architecture
from trainer.config import Config
from trainer.data.compile.length import EpochLength
from trainer.data.order.bins import steps_of_epochs
from trainer.plan.flops import work_of
from trainer.plan.gpus import Gpu
from trainer.plan.inputs import held_as, is_packed, stored_bytes, value_bytes
from trainer.plan.needs import GlobalBatch
from trainer.tuning.method import method_of

# The share of its memory's peak that a GPU reaches in operators that only move numbers.
_OF_BANDWIDTH = 0.9
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


def assumed_rate(config: Config, model: Architecture, gpu: Gpu, recomputed: float) -> Rate | None:
    """Return the rate at which this GPU would compute, at the assumed utilisation. None if its peak is not known.

    This share of the layers is computed again.
    """
    if gpu.flops is None or config.model.dtype != "bf16":
        return None
    reached = UTILISATION * gpu.flops
    tokens = config.data.sequence_length
    work = work_of(config, model, recomputed, gpu.name)
    seconds = work.of_row(tokens) / reached / config.sharding.sequence_parallel
    seconds += _decoding_seconds(config, model, gpu, recomputed)
    basis = (
        f"{reached / 1e12:,.0f} TFLOP/s on each GPU: {UTILISATION:.0%} of the {gpu.flops / 1e12:,.0f} that the data"
        f" sheet of {gpu.name} says for bf16. The share is assumed, not measured"
    )
    return Rate(seconds, tokens / seconds / config.sharding.sequence_parallel, basis)


def _decoding_seconds(config: Config, model: Architecture, gpu: Gpu, recomputed: float) -> float:
    """Return the time of a row for decoding the experts of mixtures from fewer bits, by the bytes that this moves.

    Each rank decodes all experts for a micro-batch, however few rows they get: in the forward and in the backward pass,
    and again if a layer is recomputed. Other weights have as much work as rows, so that their decoding is a part of the
    assumed share. A run through codes also moves those of all weights that it adapts.
    """
    if not gpu.bandwidth:
        return 0.0
    item = value_bytes(config)
    experts = (part for part in model.parameters if part.kind == "experts" and is_packed(part, config.quant))
    moved = sum(stored_bytes(part, config.quant, item) + item * part.numel for part in experts)
    if method_of(config).through:
        moved += sum(held_as(part, config.quant).moving_traffic * part.numel for part in model.parameters)
    return (2 + recomputed) * moved / (_OF_BANDWIDTH * gpu.bandwidth) / config.train.micro_batch


def forecast(config: Config, batch: GlobalBatch, length: Length, rate: Rate | None) -> Forecast | None:
    """Return the time that the run takes at this rate; None if its steps or the rate are not known."""
    if rate is None or length.steps is None:
        return None
    step = batch.accumulation * config.train.micro_batch * rate.seconds_a_row
    seconds, price = step * length.steps, config.track.price_per_gpu_hour
    hours = None if config.cluster.gpus_per_worker == 0 else seconds * batch.world_size / 3600
    cost = None if hours is None or price is None else hours * price
    return Forecast(step, seconds, hours, cost, rate.tokens_per_second, rate.basis, rate.run)
