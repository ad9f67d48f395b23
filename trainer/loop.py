"""The training loop. Step s is the state after s updates; step 0 is the base with fresh adapters."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from trainer.checkpoint import Checkpoints
from trainer.config import Config
from trainer.data.order import hash_key
from trainer.data.stream import Position, Stream
from trainer.engine import Engine
from trainer.errors import NonFiniteLoss, Stopped
from trainer.metrics import Metrics, StopSignal
from trainer.ranks import Ranks
from trainer.schedule import learning_rate


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


def train(run: Training, step: int, position: Position) -> Iterator[dict[str, Any]]:
    """Go from the state after `step` updates, whose next data is at `position`, to the last step; yields each update's record.

    Raises:
        NonFiniteLoss: on every rank, before anything is saved.
        Stopped: on every rank, after a stop request, with a checkpoint committed.
    """
    ranks, engine, checkpoints = run.ranks, run.engine, run.checkpoints
    first_step, last_save = step + 1, time.monotonic()
    reader = run.stream.read_from(position)
    while step < run.total_steps:
        started = time.monotonic()
        batches = next(reader)  # this rank's micro-batches of the global batch; the same number on every rank
        waited = time.monotonic() - started

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
        since_save, repeated = time.monotonic() - last_save, run.stream.dataset.reads.repeated
        rows = ranks.gather(float(nats), tokens, run.stop.requested, checkpoints.ready, since_save, waited, repeated)
        mean_loss = sum(row[0] for row in rows) / targets
        stopping = any(row[2] for row in rows)
        minutes_since_save = rows[0][4] / 60
        if not math.isfinite(mean_loss):
            raise NonFiniteLoss(
                f"the loss of step {step + 1} is {mean_loss}. Resume from the last checkpoint with a lower optim.lr."
            )

        step += 1
        lr = learning_rate(run.config.optim, step, run.total_steps)
        grad_norm = engine.step(lr)
        if not math.isfinite(grad_norm):
            raise NonFiniteLoss(
                f"the gradient of step {step} is {grad_norm}. Resume from the last checkpoint with a lower optim.lr."
            )
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
            "seconds": round(seconds, 4),
            "tokens_per_second": round(total_tokens / seconds, 1),
            "data_seconds": round(max(row[5] for row in rows), 4),  # waited for data, on the rank that waited longest
            "data_repeats": int(sum(row[6] for row in rows)),  # reads repeated so far, on all ranks
        }

        checkpoints.advance(all_ready=all(row[3] for row in rows))
        evaluated = None
        if run.eval_stream and (step == run.total_steps or (_eval_is_due(run.config, step) and not stopping)):
            evaluated = evaluate(run, run.eval_stream)
            run.metrics.write("eval", step=step, **evaluated)
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
            raise Stopped(
                f"stopped at step {step} on request, with a checkpoint committed. `capstan resume {run.config.run.name}` goes on."
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


def evaluate(run: Training, stream: Stream) -> dict[str, float]:
    """The mean loss over every target of the evaluation data, in nats. Collective."""
    run.engine.evaluating(True)
    nats, targets = 0.0, 0
    with torch.no_grad():
        for batches in stream.epoch(0):
            for batch in batches:
                nats += float(run.engine.loss(batch))
                targets += batch.targets
    run.engine.evaluating(False)
    total = run.ranks.sum(targets)
    return {"loss": run.ranks.sum(nats) / total, "targets": int(total)}
