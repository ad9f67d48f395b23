"""The training loop. Step s is the state after s updates; step 0 is the base with freshly attached trainable
parameters.
"""

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from trainer.base.load.load import Refill, nothing_refilled
from trainer.config.training import StopWhen
from trainer.data.order.order import hash_key, splitmix64
from trainer.data.order.settings import Position
from trainer.data.order.stream import Stream
from trainer.errors import DataError, Interrupted, MachineLeaves, NonFiniteLoss, Stopped
from trainer.model.micro_batch import MicroBatch
from trainer.plan.flops import UNKNOWN_WORK, StepWork
from trainer.run.folder import command
from trainer.run.requests import MACHINE_LEAVES, Stop
from trainer.state.checkpoint.checkpoints import Checkpoints
from trainer.state.zero.engine import Engine
from trainer.train.every import Actions, DataWindow, Moment, Stage
from trainer.train.heartbeat import Phase
from trainer.train.horizon import Horizon
from trainer.train.slow import Busy, SlowRanks
from trainer.train.start import Start
from trainer.train.stop_rules import StopRules
from trainer.train.supply import Supply, compiled
from trainer.tuning.objective import measured, sums_of


@dataclass(frozen=True, kw_only=True)
class Training:
    """Everything one rank needs to train, assembled in trainer/rank.py."""

    start: Start
    engine: Engine
    stream: Stream
    eval_stream: Stream | None = None
    eval_sets: Mapping[str, Stream] = field(default_factory=dict)  # the streams of eval.sets
    supply: Supply = compiled
    checkpoints: Checkpoints
    horizon: Horizon
    refill: Refill = nothing_refilled
    work: StepWork = UNKNOWN_WORK  # of a step; the records use it for the share of the device's peak
    rules: StopRules = field(default_factory=lambda: StopRules(StopWhen()))
    skipped: tuple[Position, ...] = ()  # windows whose loss was not finite in an earlier start of the run
    clock: Callable[[], float] = time.monotonic  # the clock that decides when saves are due, in seconds

    def begin(self, phase: Phase, step: int = 0) -> None:
        """Record that this rank begins `phase`, for the update that makes `step`."""
        self.start.pulse(phase, step)
        self.engine.clock.enter(phase)


class _RankStep(NamedTuple):
    """One rank's part of a step: plain numbers that all ranks exchange after the backward passes."""

    tokens: float
    weight: float  # of its part in the loss
    stop: float  # a `Stop`
    waited: float  # seconds, for data
    repeated: float  # reads of data, so far
    samples: float
    operations: float  # of floating point
    computed: float  # seconds of its device in the step before, outside of collectives


def train(run: Training, step: int, position: Position) -> Generator[dict[str, Any]]:
    """Train from the state after `step` updates, with the next data at `position`, to the last step or until
    `train.stop_when` ends it. Yields each update's record.

    Raises:
        NonFiniteLoss: on every rank, before anything is saved.
        DataError: on every rank, with a checkpoint committed, because the rest of the data cannot be compiled.
        Stopped: on every rank, after a stop request, with a checkpoint committed; `Interrupted` to be started again.
    """
    with closing(Actions(run)) as actions:
        actions.begins(step)
        yield from _steps(run, actions, step, position)


def _steps(run: Training, actions: Actions, step: int, position: Position) -> Iterator[dict[str, Any]]:
    first_step, computed, slow = step + 1, 0.0, SlowRanks(run.start)
    updated = position  # the end of the last update's data; skipped windows after it are still passed over
    reader = run.stream.read_from(
        position, lambda awaited: _wait(run, step, awaited), run.horizon.steps - step, run.skipped
    )
    while step < run.horizon.steps:
        started = time.monotonic()
        run.begin("data", step + 1)
        try:
            supplied = run.supply(run.engine, step)
            batches = next(reader)  # this rank's micro-batches of the global batch; the same number on every rank
        except (DataError, Stopped):  # On every rank: the next chapter of the data cannot be compiled.
            if step >= first_step:
                _commit_before_the_end(run, step, position)
            raise
        waited = time.monotonic() - started
        if position in run.skipped:
            run.start.metrics.write("skip", step=step, window=position.to_json())
            position = run.stream.advance(position)
            continue
        update = _update(run, actions, batches, step, position, waited=waited, computed=computed)
        step += 1
        slow.heard(step, *_busy(run, update.every))
        place, before, position = position, updated, run.stream.advance(position)
        updated = position
        seconds = time.monotonic() - started
        record = {"step": step, "epoch": place.epoch, **update.figures}
        if (passes := run.horizon.passes(position)) is not None:
            record["passes"] = passes
        spent = _spent(run)
        computed = slow.own_seconds(spent, run.engine.clock.held_up())
        totals = _totals(run, update.every, spent, seconds)
        yield {**record, **update.measured, **supplied, **totals, **actions.stepped(step)}
        window = DataWindow(before, position)
        if _follow(run, actions, update, batches, step, window, first=step == first_step):
            return
        if slow.to_replace and run.checkpoints.newest == step:
            run.checkpoints.finish()
            raise slow.replaced(step)


class _Update(NamedTuple):
    """A finished update: each rank's part, what its actions `told`, the loss with the learning rate and the gradient's
    norm, and the objective's figures.
    """

    every: list[_RankStep]
    told: list[list[float]]
    figures: dict[str, float]
    measured: dict[str, float]


def _update(
    run: Training,
    actions: Actions,
    batches: Sequence[MicroBatch],
    step: int,
    position: Position,
    *,
    waited: float,
    computed: float,
) -> _Update:
    """Make the update after `step`, from the data at `position`. Collective; raises `NonFiniteLoss` on every rank."""
    ranks, objective = run.start.ranks, run.start.objective
    run.begin("step", step + 1)
    # The loss is the mean over the targets (or pairs) of the global batch, so each weighs the same with any
    # accumulation, packing and number of ranks. So count them all before the first backward pass.
    mine = sum(map(objective.weight, batches))
    seen_before = run.engine.seeing_operations
    sums = _gradients(run, batches, step, ranks.total(torch.tensor(mine)))
    # Ranks that share a row look at the same pictures.
    seeing = (run.engine.seeing_operations - seen_before) / run.start.config.sharding.sequence_parallel
    # One exchange, from which every rank draws the same conclusions. It is read while the update waits for the
    # gradient's norm, the only time in a step that we wait for the device. An update by a loss that is not finite is
    # never kept.
    part = _RankStep(
        tokens=sum(batch.tokens for batch in batches),
        weight=mine,
        stop=run.start.stop.requested,
        waited=waited,
        repeated=run.stream.chapters.reads.repeated,
        samples=samples_key(batches),
        operations=run.work.of(batches) + seeing,
        computed=computed,
    )
    exchange = _exchange(run, part, actions.told(), sums)
    lr = run.horizon.rate(run.start.config.optim, step + 1)
    grad_norm = run.engine.step(lr)
    every, told, totals = exchange()
    weight = sum(rank.weight for rank in every)
    loss, *measures = (total / weight for total in totals)
    # Answers are sampled for one update, so no others can take their place.
    window = None if run.stream.rollouts else position
    if not math.isfinite(loss):
        raise _not_finite("loss", step + 1, loss, window)
    if not math.isfinite(grad_norm):
        raise _not_finite("gradient", step + 1, grad_norm, window)
    figures = {"loss": loss, "lr": lr, "grad_norm": grad_norm}
    return _Update(every, told, figures, {objective.unit: int(weight), **measured(objective, measures)})


def _follow(
    run: Training,
    actions: Actions,
    update: _Update,
    batches: Sequence[MicroBatch],
    step: int,
    window: DataWindow,
    *,
    first: bool,
) -> bool:
    """Let the actions that are due in the state at `step` act. Returns whether the training ends there. Collective.

    Raises `Stopped` after a stop request, with the state committed.
    """
    stopping, over = Stop(int(max(rank.stop for rank in update.every))), step == run.horizon.steps
    run.begin("save", step)
    actions.heard(update.told)
    now = Moment(
        step, window, batches, update.figures, first=first, last=over or bool(stopping), stopping=bool(stopping)
    )
    actions.act(now, Stage.MEASURE)
    ended = run.rules.end(step, update.figures["loss"], now.evaluated)
    now.last = now.last or ended
    actions.act(now, Stage.KEEP, Stage.REPORT)
    if stopping and not over:
        raise _stopped(run, stopping, step)
    if ended:
        run.start.log(f"ends at step {step}: {run.rules.ended}")
    return ended


def _busy(run: Training, every: Sequence[_RankStep]) -> tuple[list[float], list[Busy]]:
    """The arguments of `SlowRanks.heard`. Where answers are sampled, ranks wait for them and for each other."""
    waits = run.stream.rollouts is None
    work = [rank.operations or rank.tokens for rank in every]
    told = zip(every, work, strict=True)
    return [rank.computed for rank in every], [
        Busy(0.0, rank.waited if waits else 0.0, amount, rank.repeated) for rank, amount in told
    ]


def _gradients(run: Training, batches: Sequence[MicroBatch], step: int, weight: Tensor) -> Tensor:
    """Add up the gradients of this rank's part of the step after `step`, and return its summed loss and measures
    (fp64). `weight` (), over all ranks, is on the device.
    """
    run.engine.clock.enter("forward")
    surveyed = surveys(run, batches)
    sums = torch.zeros(1 + sums_of(run.start.objective), dtype=torch.float64, device=run.start.ranks.device)
    for index, batch in enumerate(batches):
        torch.manual_seed(_dropout_seed(run.start.config.run.seed, step, index, run.start.ranks.rank))
        run.engine.clock.enter("forward")
        row = run.engine.loss(replace(batch, survey=next(surveyed))).reshape(-1)
        sums += row.detach()
        run.engine.backward(row[0] / weight, last=index == len(batches) - 1)
    run.engine.clock.enter("step")
    return sums


def surveys(run: Training, batches: Iterable[MicroBatch]) -> Iterator[Tensor | None]:
    """For each micro-batch of this rank, the `MicroBatch.survey` that its loss needs, if any, computed over all ranks.
    Collective.
    """
    survey = run.start.objective.survey
    if survey is None:
        return repeat(None)
    with run.engine.evaluating():
        rows = [run.engine.look(survey.look, batch) for batch in batches]
    mine = torch.stack([row[: survey.sums] for row in rows]).double().sum(0)
    with run.engine.clock.within("gather"):
        totals = run.start.ranks.gather_tensor(mine).sum(0).float()
    return (torch.cat([totals, row[survey.sums :]]) for row in rows)


def _exchange(
    run: Training, mine: _RankStep, told: Sequence[float | Tensor], sums: Tensor
) -> Callable[[], tuple[list[_RankStep], list[list[float]], list[float]]]:
    """Start exchanging every rank's part of the step and what its actions have `told`, in rank order, and the `sums`
    over all ranks. Calling the result reads them. Collective.
    """
    gathered = run.start.ranks.begin_gather(*mine, *told, sums=sums)
    own, all_told = len(mine), len(mine) + len(told)

    def read() -> tuple[list[_RankStep], list[list[float]], list[float]]:
        every = gathered()
        totals = [sum(column, 0.0) for column in zip(*(rank[all_told:] for rank in every), strict=True)]
        return [_RankStep(*rank[:own]) for rank in every], [list(rank[own:all_told]) for rank in every], totals

    return read


def _spent(run: Training) -> dict[str, float]:
    """The seconds of each of this rank's phases since the previous call."""
    run.engine.clock.enter("save")
    return run.engine.clock.passed()


def _totals(run: Training, every: Sequence[_RankStep], spent: Mapping[str, float], seconds: float) -> dict[str, Any]:
    """The parts of a step's record that add up over the ranks, and how long each of rank 0's phases took."""
    tokens = sum(int(rank.tokens) for rank in every)
    data = max(rank.waited for rank in every)  # on the rank that waited longest
    # The ranks meet before the first pass. If another rank waited for its data, rank 0 waited for that rank.
    exchange = spent.get("step", 0.0) + spent.get("data", 0.0) - data
    others = {phase: took for phase, took in spent.items() if phase not in ("step", "data")}
    phases = {**others, "data": data, "exchange": max(0.0, exchange)}
    return {
        "tokens": tokens,
        "samples": f"{int(sum(rank.samples for rank in every)) % 2**32:08x}",
        "seconds": round(seconds, 4),
        "tokens_per_second": round(tokens / seconds, 1),
        **run.work.measured(sum(rank.operations for rank in every), seconds * len(every)),
        **{f"{phase}_seconds": round(took, 6) for phase, took in phases.items()},
        "data_repeats": int(sum(rank.repeated for rank in every)),  # reads repeated so far, on all ranks
    }


def _wait(run: Training, step: int, awaited: bool) -> None:
    """Show that the run is alive while the data of the step after `step` is still being compiled."""
    run.start.pulse("compile" if awaited else "data", step + 1)
    if awaited:
        run.start.metrics.write("compiling", step=step)


def stop_before_training(run: Training, step: int, position: Position, *, committed: bool) -> None:
    """End here if a stop was requested while the model was loaded, before anything is trained. Collective.

    Raises `Stopped`, with the state at `step` committed in any case.
    """
    stopping = Stop(int(max(row[0] for row in run.start.ranks.gather(run.start.stop.requested))))
    if not stopping:
        return
    if not committed:
        _commit_before_the_end(run, step, position)
    raise _stopped(run, stopping, step)


def _commit_before_the_end(run: Training, step: int, position: Position) -> None:
    """Commit the state at `step` unless it is committed already. Collective."""
    run.begin("save", step)
    if run.checkpoints.newest != step:
        run.checkpoints.save(run.engine, step, position.to_json(), eval_loss=None, may_skip=False)
    run.checkpoints.finish()


def _stopped(run: Training, stopping: Stop, step: int) -> Stopped:
    reason: str = run.start.ranks.broadcast(run.start.stop.reason)
    if stopping is Stop.RESTART:
        kind = MachineLeaves if reason == MACHINE_LEAVES else Interrupted
        return kind(f"stopped at step {step} {reason}, with a checkpoint committed")
    return Stopped(
        f"stopped at step {step} {reason}, with a checkpoint committed. {command('resume', run.checkpoints.run)}"
        " goes on."
    )


def _not_finite(what: str, step: int, value: float, window: Position | None) -> NonFiniteLoss:
    return NonFiniteLoss(
        f"the {what} of step {step} is {value}. Resume with a lower optim.lr, or start again if nothing is committed.",
        None if window is None else window.to_json(),
    )


def _dropout_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """The seed of dropout. It depends only on the position in the run, so a checkpoint needs no generator state."""
    return int(hash_key(seed, step, micro_batch, rank))


def samples_key(batches: Sequence[MicroBatch]) -> int:
    """A number for the documents of one rank's step. The sum over ranks identifies the step's documents on any number
    of ranks.
    """
    documents = np.array([number for batch in batches for number in batch.documents], dtype=np.uint64)
    places = [
        (at.epoch << 48) + (at.chapter << 40) + (at.window << 24) + at.bin for batch in batches for at in batch.bins
    ]
    bins = np.array(places, dtype=np.uint64)
    # Split into halves of 32 bits: their sums over millions of documents are exact in an exchange's float64.
    return sum(int((splitmix64(numbers) >> np.uint64(32)).sum()) for numbers in (documents, bins))
