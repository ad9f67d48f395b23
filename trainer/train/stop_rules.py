"""When a run ends by itself before its last step, `train.stop_when`: the loss stays high, or evaluations no longer get better."""

from collections.abc import Mapping

from trainer.config.training import StopWhen
from trainer.run.records import generations, read_records
from trainer.train.start import Start


class StopRules:
    """The rules of a run, and what they have seen; every rank sees the same. `evaluated` are the losses of the evaluations of earlier
    starts, by step."""

    ended = ""
    """Why the run has ended, as a clause; empty while it goes on."""

    def __init__(self, rules: StopWhen, evaluated: Mapping[int, float] | None = None) -> None:
        self._rules, self._evaluated, self._high = rules, dict(evaluated or {}), 0

    def end(self, step: int, loss: float, evaluated: float | None) -> bool:
        """Whether the run ends with the state at `step`. `loss` is that of the update, `evaluated` that of the evaluation after it, if
        there was one."""
        self.ended = self._high_loss(loss) or (self._no_better(step, evaluated) if evaluated is not None else "")
        return bool(self.ended)

    def _high_loss(self, loss: float) -> str:
        rules = self._rules
        self._high = self._high + 1 if rules.loss_above is not None and loss > rules.loss_above else 0
        if self._high >= rules.loss_steps:
            return (
                f"the loss was above {rules.loss_above:g} in {self._high} steps in a row (train.stop_when.loss_above)"
            )
        return ""

    def _no_better(self, step: int, evaluated: float) -> str:
        self._evaluated[step] = evaluated
        best = min(self._evaluated, key=lambda step: (self._evaluated[step], step))
        since = sum(other > best for other in self._evaluated)
        if not self._rules.no_better or since < self._rules.no_better:
            return ""
        return (
            f"{since} evaluations in a row were no better than {self._evaluated[best]:.4f}, that of step {best}, which is kept "
            "(train.stop_when.no_better)"
        )


def open_stop_rules(start: Start, step: int) -> StopRules:
    """The rules of a start that goes on from `step`. Collective. The records of earlier starts are read only where a rule asks for them."""
    rules = start.config.train.stop_when
    evaluated = _evaluated(start, step) if rules.no_better and start.ranks.rank == 0 else {}
    return StopRules(rules, start.ranks.broadcast(evaluated))


def _evaluated(start: Start, step: int) -> dict[int, float]:
    """The losses by which checkpoints are kept, of evaluations up to `step` in earlier starts."""
    config = start.config
    named = None if config.data.eval or config.data.held_out else next(iter(config.eval.sets), None)
    return {
        record["step"]: record["loss"]
        for generation in generations(start.folder)
        for record in read_records(start.folder, generation)
        if record["kind"] == "eval" and record.get("set") == named and 0 < record["step"] <= step
    }
