"""A run ends by itself when its loss stays high, or when its evaluations no longer get better."""

import pytest

from trainer.config.training import StopWhen
from trainer.train.stop_rules import StopRules


def ends_at(
    rules: StopRules, losses: list[float], evaluated: dict[int, float] | None = None, first: int = 1
) -> int | None:
    given = evaluated or {}
    return next((step for step, loss in enumerate(losses, first) if rules.end(step, loss, given.get(step))), None)


def test_a_loss_ends_the_run_when_it_is_above_the_limit_so_many_times_in_a_row() -> None:
    rules = StopRules(StopWhen(loss_above=3, loss_steps=3))
    assert ends_at(rules, [4, 4, 2, 4, 4, 4, 1]) == 6
    assert rules.ended == "the loss was above 3 in 3 steps in a row (train.stop_when.loss_above)"
    assert ends_at(StopRules(StopWhen(loss_above=3, loss_steps=4)), [4, 4, 2, 4, 4, 4, 1]) is None
    assert ends_at(StopRules(StopWhen()), [1e9] * 9) is None


def test_evaluations_end_the_run_when_the_best_one_is_so_many_back() -> None:
    losses = {2: 1.0, 4: 0.8, 6: 0.9, 8: 0.8, 10: 0.7}
    rules = StopRules(StopWhen(no_better=2))
    assert ends_at(rules, [1.0] * 10, losses) == 8, "an equal one is no better"
    assert rules.ended == (
        "2 evaluations in a row were no better than 0.8000, that of step 4, which is kept (train.stop_when.no_better)"
    )
    assert ends_at(StopRules(StopWhen(no_better=3)), [1.0] * 10, losses) is None


@pytest.mark.parametrize("until", [2, 4, 6])
def test_a_resumed_run_ends_where_it_would_have(until: int) -> None:
    losses = {2: 1.0, 4: 0.8, 6: 0.9, 8: 0.8, 10: 0.7}
    before = {step: loss for step, loss in losses.items() if step <= until}
    assert ends_at(StopRules(StopWhen(no_better=2), before), [1.0] * 10, losses, until + 1) == 8
