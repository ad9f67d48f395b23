"""The process beside a run that has servers sample, by the function that `capstan rollout` calls."""

from typing import Any

from tests.dist.runs import outcome_of
from trainer.evaluate.request import Ask
from trainer.evaluate.rollout.serving import roll_out


def sample(run: str) -> dict[str, Any]:
    return outcome_of(lambda: roll_out(Ask("rollout", run), lambda told: None))
