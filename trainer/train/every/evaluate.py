"""Evaluations in the course of a run: every `eval.every` steps or `eval.per_epoch` times a pass, and at the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from trainer.train.every import Action, ActionKind, Actions, Moment

if TYPE_CHECKING:
    from trainer.data.order.stream import Stream
    from trainer.model.micro_batch import MicroBatch
    from trainer.train.loop import Training


@dataclass
class Evaluate(Action):
    run: Training
    actions: Actions

    def is_due(self, now: Moment) -> bool:
        rules = self.run.start.config.eval
        if now.window is None:
            return rules.between
        due = now.is_every(rules.every) or self.run.horizon.is_due(rules.per_epoch, *now.window)
        return now.step == self.run.horizon.steps or (due and not now.stopping)

    def act(self, now: Moment) -> None:
        """Evaluate, and remember the loss, in nats, of the data without a name, or of the first set if there is
        none.
        """
        from trainer.config.evaluation import split_of
        from trainer.evaluate.losses import mean_loss

        run, step = self.run, now.step
        # Backwards, so that the newest record is that of the data whose loss decides which checkpoints are kept.
        for name, stream in reversed(list(run.eval_sets.items())):
            loss, tokens = mean_loss(run.engine, stream, lambda _: run.begin("evaluate"))
            measured = self.actions.evaluated(step, split_of(name))
            run.start.metrics.write("eval", step=step, set=name, loss=loss, tokens=tokens, **measured)
            now.evaluated = loss
        if run.eval_stream is not None:
            found = self._objective_means(run.eval_stream) | self.actions.evaluated(step, split_of())
            run.start.metrics.write("eval", step=step, **found)
            now.evaluated = found["loss"]
        run.begin("save", step)

    def _objective_means(self, stream: Stream) -> dict[str, float]:
        """The mean loss over every target (or pair, or answer) of the evaluation data, in nats, and the measures."""
        import torch

        from trainer.evaluate.losses import objective_means
        from trainer.train.loop import surveys

        run = self.run
        surveyed = surveys(run, self._rows(stream))
        with run.engine.evaluating(), torch.no_grad():
            means, total = objective_means(
                run.start.ranks,
                run.start.objective,
                self._rows(stream),
                lambda batch: run.engine.loss(replace(batch, survey=next(surveyed))),
            )
        return {**means, run.start.objective.unit: total}

    def _rows(self, stream: Stream) -> Iterator[MicroBatch]:
        """This rank's rows of the evaluation data. Each row shows that the run is alive."""
        for batches in stream.epoch(0):
            self.run.begin("evaluate")
            yield from batches


ACTIONS = {"evaluate": ActionKind(Evaluate)}
