"""The training loop. Step s is the state after s updates; step 0 is the base with fresh adapters."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.checkpoint.checkpoints import Checkpoints
from trainer.config import Config
from trainer.data.order import hash_key, splitmix64
from trainer.data.stream import MicroBatch, Position, Stream
from trainer.errors import DataError, Interrupted, NonFiniteLoss, Stopped
from trainer.ranks import Ranks
from trainer.run.metrics import Metrics
from trainer.run.requests import Stop, StopSignal
from trainer.train.heartbeat import Pulse, silent_pulse
from trainer.train.schedule import learning_rate
from trainer.zero.engine import Engine


@dataclass(frozen=True)
class Training:
    """Everything one rank needs to train, assembled in trainer/rank.py."""

    config: Config
    ranks: Ranks
    engine: Engine
    stream: Stream
    eval_stream: Stream | None
    checkpoints: Checkpoints
    metrics: Metrics
    stop: StopSignal
    total_steps: int
    pulse: Pulse = silent_pulse
    skipped: tuple[Position, ...] = ()  # their loss was not finite in an earlier start of the run


def train(run: Training, step: int, position: Position) -> Iterator[dict[str, Any]]:
    """Go from the state after `step` updates, whose next data is at `position`, to the last step; yields each update's record.

    Raises:
        NonFiniteLoss: on every rank, before anything is saved.
        DataError: on every rank, with a checkpoint committed, because the rest of the data cannot be compiled.
        Stopped: on every rank, after a stop request, with a checkpoint committed; `Interrupted` to be started again.
    """
    ranks, engine, checkpoints = run.ranks, run.engine, run.checkpoints
    first_step, last_save = step + 1, time.monotonic()
    reader = run.stream.read_from(position, compiling=lambda awaited: _wait(run, step, awaited))
    while step < run.total_steps:
        started = time.monotonic()
        run.pulse("data", step + 1)
        try:
            batches = next(reader)  # this rank's micro-batches of the global batch; the same number on every rank
        except (DataError, Stopped):  # on every rank: the next chapter of the data will not be compiled
            if step >= first_step:
                _keep(run, step, position)
            raise
        waited = time.monotonic() - started
        if position in run.skipped:
            run.metrics.write("skip", step=step, window=position.to_json())
            position = run.stream.advance(position)
            continue

        run.pulse("step", step + 1)
        # The loss is the mean over the target tokens of the global batch, so a token weighs the same whatever the
        # accumulation, the packing and the number of ranks: count them all before the first backward pass.
        targets = ranks.sum(sum(batch.targets for batch in batches))
        nats = torch.zeros((), dtype=torch.float64, device=ranks.device)
        for index, batch in enumerate(batches):
            torch.manual_seed(_dropout_seed(run.config.run.seed, step, index, ranks.rank))
            loss = engine.loss(batch)
            nats += loss.detach()
            engine.backward(loss / targets, last=index == len(batches) - 1)

        # One exchange, and every rank draws the same conclusions from it. Rank 0's clock decides when to save.
        tokens = sum(batch.tokens for batch in batches)
        since_save, repeated = time.monotonic() - last_save, run.stream.chapters.reads.repeated
        rows = ranks.gather(
            float(nats),
            tokens,
            run.stop.requested,
            checkpoints.ready,
            since_save,
            waited,
            repeated,
            samples_key(batches),
        )
        mean_loss = sum(row[0] for row in rows) / targets
        stopping = Stop(int(max(row[2] for row in rows)))
        minutes_since_save = rows[0][4] / 60
        if not math.isfinite(mean_loss):
            raise _not_finite("loss", step + 1, mean_loss, position)

        step += 1
        lr = learning_rate(run.config.optim, step, run.total_steps)
        grad_norm = engine.step(lr)
        if not math.isfinite(grad_norm):
            raise _not_finite("gradient", step, grad_norm, position)
        position = run.stream.advance(position)
        seconds = time.monotonic() - started
        total_tokens = sum(int(row[1]) for row in rows)
        yield {
            "step": step,
            "loss": mean_loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens": total_tokens,
            "targets": int(targets),
            "samples": f"{int(sum(row[7] for row in rows)) % 2**32:08x}",
            "seconds": round(seconds, 4),
            "tokens_per_second": round(total_tokens / seconds, 1),
            "data_seconds": round(max(row[5] for row in rows), 4),  # waited for data, on the rank that waited longest
            "data_repeats": int(sum(row[6] for row in rows)),  # reads repeated so far, on all ranks
        }

        run.pulse("save", step)
        checkpoints.advance(all_ready=all(row[3] for row in rows))
        evaluated = None
        if run.eval_stream and (step == run.total_steps or (_eval_is_due(run.config, step) and not stopping)):
            evaluated = evaluate(run, run.eval_stream)
            run.metrics.write("eval", step=step, **evaluated)
            run.pulse("save", step)
        last, best = stopping or step == run.total_steps, run.config.checkpoint.keep_best and evaluated
        if step == first_step or last or best or _save_is_due(run.config, step, minutes_since_save):
            loss = evaluated["loss"] if evaluated else None
            checkpoints.save(engine, step, position.to_json(), eval_loss=loss, may_skip=not last)
            last_save = time.monotonic()
        if step == first_step:
            checkpoints.prove()
        if last:
            checkpoints.finish()
        if stopping and step < run.total_steps:
            raise _stopped(run, stopping, step)


def _wait(run: Training, step: int, awaited: bool) -> None:
    """Show that the run is alive while the data of the step after `step` is still compiled."""
    run.pulse("compile" if awaited else "data", step + 1)
    if awaited:
        run.metrics.write("compiling", step=step)


def _keep(run: Training, step: int, position: Position) -> None:
    """Commit the state at `step`, if it is not yet, before the run ends. Collective."""
    run.pulse("save", step)
    if run.checkpoints.newest != step:
        run.checkpoints.save(run.engine, step, position.to_json(), eval_loss=None, may_skip=False)
    run.checkpoints.finish()


def stop_before_training(run: Training, step: int, position: Position, *, committed: bool) -> None:
    """End here when it was asked for while the model was loaded: nothing is trained yet. Collective.

    Raises `Stopped`, with the state at `step` committed in any case.
    """
    stopping = Stop(int(max(row[0] for row in run.ranks.gather(run.stop.requested))))
    if not stopping:
        return
    if not committed:
        run.checkpoints.save(run.engine, step, position.to_json(), eval_loss=None, may_skip=False)
        run.checkpoints.finish()
    raise _stopped(run, stopping, step)


def _stopped(run: Training, stopping: Stop, step: int) -> Stopped:
    reason: str = run.ranks.broadcast(run.stop.reason)
    if stopping is Stop.RESTART:
        return Interrupted(f"stopped at step {step} {reason}, with a checkpoint committed")
    return Stopped(
        f"stopped at step {step} {reason}, with a checkpoint committed. `capstan resume {run.config.run.name}` goes on."
    )


def _not_finite(what: str, step: int, value: float, position: Position) -> NonFiniteLoss:
    return NonFiniteLoss(
        f"the {what} of step {step} is {value}. Resume from the last checkpoint with a lower optim.lr.",
        position.to_json(),
    )


def _save_is_due(config: Config, step: int, minutes_since_save: float) -> bool:
    rules = config.checkpoint
    by_step = rules.every_steps > 0 and step % rules.every_steps == 0
    return by_step or (rules.every_minutes > 0 and minutes_since_save >= rules.every_minutes)


def _eval_is_due(config: Config, step: int) -> bool:
    return config.train.eval_every > 0 and step % config.train.eval_every == 0


def _dropout_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """Randomness derives from the position in the run, so a checkpoint needs no generator state."""
    return int(hash_key(seed, step, micro_batch, rank))


def samples_key(batches: list[MicroBatch]) -> int:
    """Of one rank's documents of a step, so that the sum over ranks tells which they were, whatever the world size."""
    documents = np.array([number for batch in batches for number in batch.documents], dtype=np.uint64)
    places = [
        (at.epoch << 48) + (at.chapter << 40) + (at.window << 24) + at.bin for batch in batches for at in batch.bins
    ]
    bins = np.array(places, dtype=np.uint64)
    # Halves of 32 bits: sums of millions of them are exact in the float64 of an exchange.
    return sum(int((splitmix64(numbers) >> np.uint64(32)).sum()) for numbers in (documents, bins))


def evaluate(run: Training, stream: Stream) -> dict[str, float]:
    """The mean loss over every target of the evaluation data, in nats. Collective."""
    run.engine.evaluating(True)
    nats, targets = 0.0, 0
    with torch.no_grad():
        for batches in stream.epoch(0):
            run.pulse("evaluate", 0)
            for batch in batches:
                nats += float(run.engine.loss(batch))
                targets += batch.targets
    run.engine.evaluating(False)
    total = run.ranks.sum(targets)
    return {"loss": run.ranks.sum(nats) / total, "targets": int(total)}
