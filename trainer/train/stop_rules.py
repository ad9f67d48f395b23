"""The rules of `train.stop_when`, by which a run ends before its last step: its loss stays high, or evaluations no
longer improve.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from trainer.config.evaluation import UNNAMED, split_of
from trainer.config.training import StopWhen
from trainer.run.records import generations, read_records
from trainer.train.start import Start

_NONE: Mapping[int, float] = {}


class StopRules:
    """The rules of a run, and what they have seen, which is the same on every rank. `evaluated` are the evaluation
    losses of earlier starts and `losses` their updates' losses, each by its step.
    """

    ended = ""
    """Why the run has ended, as a clause; empty while it goes on."""

    def __init__(
        self, rules: StopWhen, evaluated: Mapping[int, float] = _NONE, losses: Mapping[int, float] = _NONE
    ) -> None:
        self._rules, self._evaluated, self._high = rules, dict(evaluated), 0
        for step in sorted(losses):
            self._count(losses[step])

    def end(self, step: int, loss: float, evaluated: float | None) -> bool:
        """Whether the run ends with the state at `step`. `loss` is the update's; `evaluated` is that of the evaluation
        after it, if there was one.
        """
        self._count(loss)
        self.ended = self._high_loss() or (self._no_better(step, evaluated) if evaluated is not None else "")
        return bool(self.ended)

    def _count(self, loss: float) -> None:
        limit = self._rules.loss_above
        self._high = self._high + 1 if limit is not None and loss > limit else 0

    def _high_loss(self) -> str:
        rules = self._rules
        if self._high >= rules.loss_steps:
            return (
                f"the loss was above {rules.loss_above:g} in {self._high} steps in a row (train.stop_when.loss_above)"
            )
        return ""

    def _no_better(self, step: int, evaluated: float) -> str:
        self._evaluated[step] = math.inf if math.isnan(evaluated) else evaluated
        best = min(self._evaluated, key=lambda step: (self._evaluated[step], step))
        since = sum(other > best for other in self._evaluated)
        if not self._rules.no_better or since < self._rules.no_better:
            return ""
        # Of equal ones, the newest is kept: retention.removable.
        kept = max(step for step, loss in self._evaluated.items() if loss == self._evaluated[best])
        return (
            f"{since} evaluations in a row were no better than {self._evaluated[best]:.4f}; the checkpoint of step"
            f" {kept} has this loss and is kept (train.stop_when.no_better)"
        )


class _Seen(NamedTuple):
    evaluated: dict[int, float]
    losses: dict[int, float]


def open_stop_rules(start: Start, step: int, evaluated: str | None) -> StopRules:
    """The rules of a start that goes on from `step`; `evaluated` is the fingerprint of the data by which checkpoints
    are kept. Collective. The records of earlier starts are read only where a rule asks for them."""
    rules = start.config.train.stop_when
    asks = step > 0 and (rules.no_better or rules.loss_above is not None)
    seen = _seen(start, step, evaluated) if asks and start.ranks.rank == 0 else _Seen({}, {})
    return StopRules(rules, *start.ranks.broadcast(seen))


def _seen(start: Start, step: int, evaluated: str | None) -> _Seen:
    """The losses up to `step` in earlier starts: of the evaluations over the same data, and of the last updates that
    may count.
    """
    config, seen = start.config, _Seen({}, {})
    named = None if config.data.eval or config.data.held_out else next(iter(config.eval.sets), None)
    for generation in generations(start.folder):
        same = True
        for record in read_records(start.folder, generation):
            if record["kind"] == "start" and "data" in record:
                same = record["data"].get(split_of(named or UNNAMED)) == evaluated
            if record["kind"] not in ("step", "eval") or not 0 < record["step"] <= step:
                continue
            if record["kind"] == "step":
                seen.losses[record["step"]] = record.get("loss", math.inf)
            elif same and record.get("set") == named:
                seen.evaluated[record["step"]] = record.get("loss", math.inf)
    last = range(step - config.train.stop_when.loss_steps + 1, step + 1)
    return _Seen(seen.evaluated, {at: seen.losses[at] for at in last if at in seen.losses})
