"""Whose turn it is in a sweep, who is stopped early, and how much the metric depends on a setting."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.drive.tune import STEP, VALUE, EarlyStopping, Queue, next_look
from launcher.policy.trials import Candidate, Trial, Turns, sensitivities
from tests.unit.launcher.test_sweep import LR
from trainer.config.sweep import Sweep


def test_trials_that_share_what_is_not_made_wait_for_the_first_and_never_exceed_the_room() -> None:
    made = set[str]()
    waiting = [Candidate(number, frozenset({"base", f"data-{number % 2}"})) for number in range(1, 6)]
    turns = Turns([*waiting, Candidate(6, done=True)], made.__contains__, lambda number: 3)
    assert turns.next() == 6  # its figures first, for which it needs no room
    assert [turns.next(), turns.next()] == [1, None]
    made |= {"base"}
    assert [turns.next(), turns.next()] == [2, None]  # 3 and 5 need the data that 1 makes, 4 that of 2
    made |= {"data-0", "data-1"}
    assert [turns.next(), turns.next()] == [3, None]  # the room is full
    turns.ended(1)
    assert turns.next() == 4


def test_a_trial_that_has_ended_makes_room_and_leaves_how_it_ended() -> None:
    candidates = [Candidate(number) for number in (1, 2, 3)]
    turns = Turns(candidates, lambda key: True, lambda number: 1)
    queue = Queue(turns, "s3://runs/sweep", lambda: False)
    assert queue.suggest("a") == {"sweep": "s3://runs/sweep", "trial": 1}
    assert queue.suggest("b") is None, "there is room for one"
    queue.on_trial_complete("a", {"exit_code": 6, "reason": "the store is away"})
    queue._looked = 0.0  # a second later
    assert queue.suggest("b") == {"sweep": "s3://runs/sweep", "trial": 2}
    queue.on_trial_complete("b", None, error=True)
    queue._looked = 0.0
    assert queue.suggest("c") == {"sweep": "s3://runs/sweep", "trial": 3}
    assert queue.suggest("d") == "FINISHED"
    queue.on_trial_complete("c", {})
    assert {number: end.exit_code for number, end in queue.ends.items()} == {1: 6, 2: 1, 3: 0}
    assert (queue.ends[1].reason, queue.ends[3].reason) == ("the store is away", "")


def test_the_next_takes_over_where_the_trial_that_was_to_make_something_ends_without_it() -> None:
    turns = Turns([Candidate(number, frozenset({"base"})) for number in (1, 2, 3)], lambda key: False, lambda number: 9)
    assert [turns.next(), turns.next()] == [1, None]
    turns.ended(1)
    assert [turns.next(), turns.next()] == [2, None]


def asha(curves: dict[str, dict[int, float]], mode: str = "min") -> dict[str, int]:
    """The step at which each trial is asked to stop, where their figures come in turns."""
    sweep = Sweep.model_validate({"grace_steps": 10, "reduction_factor": 2})
    stopped: dict[str, int] = {}

    def stop(settings: Mapping[str, Any], step: int) -> None:
        assert settings["name"] not in stopped
        stopped[settings["name"]] = step

    scheduler = EarlyStopping(sweep, mode, stop)
    trials = [SimpleNamespace(trial_id=name, config={"name": name}) for name in curves]
    for trial in trials:
        scheduler.on_trial_add(None, trial)  # type: ignore[arg-type]
    for step in sorted({step for curve in curves.values() for step in curve}):
        for trial in trials:
            if step in curves[trial.trial_id]:
                result = {STEP: step, VALUE: curves[trial.trial_id][step]}
                assert scheduler.on_trial_result(None, trial, result) == "CONTINUE"  # the run ends itself
    return stopped


def test_asha_asks_those_that_are_worse_to_stop() -> None:
    curves = {name: {10: loss, 20: loss, 40: loss} for name, loss in (("a", 3.0), ("b", 1.0), ("c", 4.0), ("d", 2.0))}
    # a and b are the best when they come; c is worse than the median of both, d too; of those left b is better at 20.
    assert asha(curves) == {"c": 10}
    assert asha(dict(sorted(curves.items(), key=lambda item: item[1][10]))) == {"d": 10, "a": 10, "c": 10}
    assert asha(curves, mode="max").keys() == {"b", "d"}
    early = {name: {1: loss, 2: loss, 9: loss, 10: 1.0} for name, loss in (("a", 1.0), ("b", 5.0), ("c", 9.0))}
    assert asha(early) == {}, "before the grace nobody is judged"


def test_asha_looks_at_multiples_of_the_grace() -> None:
    sweep = Sweep.model_validate({"grace_steps": 10, "reduction_factor": 3})
    assert [next_look(sweep, step) for step in (0, 9, 10, 29, 30)] == [10, 10, 30, 30, 90]
    assert next_look(Sweep(), 0) is None


def test_sensitivity_is_of_the_last_step_that_all_have_and_says_how_many_they_are() -> None:
    settings = {"optim.lr": LR, "tuning.rank": {"grid": [4, 8]}, "optim.weight_decay": {"uniform": [0, 1]}}
    rows = [(1e-5, 4, 0.5, 5.0), (1e-4, 8, 0.1, 4.0), (1e-3, 4, 0.9, 3.0), (1e-2, 8, 0.7, 2.0)]
    trials = [
        Trial(number, "", {"optim.lr": rate, "tuning.rank": rank, "optim.weight_decay": noise})
        for number, (rate, rank, noise, _) in enumerate(rows, 1)
    ]
    # Behind the common step the first two trials would turn the result round.
    curves = {number: {10: loss, 20: 0.0} if number < 3 else {10: loss} for number, (*_, loss) in enumerate(rows, 1)}
    rank, rate, noise = sensitivities(settings, trials, curves)
    assert (rate.setting, rate.correlation, rate.step, rate.trials) == ("optim.lr", pytest.approx(-1), 10, 4)
    assert [mean["mean"] for mean in rank.means] == [4.0, 3.0]
    assert rank.spread == pytest.approx(1.0)
    # Ranks 2, 1, 4, 3 of the setting and 4, 3, 2, 1 of the loss: 1 - 6 * (4 + 4 + 4 + 4) / (4 * 15).
    assert noise.correlation == pytest.approx(-0.6)
    assert "falls with it, rank correlation -1.00 (at step 10, 4 trials)" in rate.sentence("eval")
    assert "4: 4.0000 (2), 8: 3.0000 (2)" in rank.sentence("eval")
    assert sensitivities(settings, trials, {}) == []
    untrained = sensitivities(settings, trials, {**curves, 4: {0: 9.0}})  # the fourth has got no further than the base
    assert [(one.trials, one.step) for one in untrained] == [(3, 10)] * 3
    both = {number: {10: 0.0, 20: loss} for number, (*_, loss) in enumerate(rows, 1)}
    last = sensitivities({"optim.lr": LR}, trials, both)
    assert (last[0].step, last[0].correlation) == (20, pytest.approx(-1)), "the last step, and not the first"
    tied = {number: {10: loss} for number, loss in enumerate((1.0, 2.0, 2.0, 3.0), 1)}
    (shared,) = sensitivities({"optim.lr": LR}, trials, tied)
    # Equal losses share their ranks: 1, 2.5, 2.5, 4 beside 1, 2, 3, 4. The covariance is 4.5, the variances 4.5 and 5.
    assert shared.correlation == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    weak = {1: {10: 1.0}, 2: {10: 3.0}, 3: {10: 2.0}, 4: {10: 4.0}}  # 0.8 with the rate, and less with the decay
    strongest = sensitivities({"optim.weight_decay": settings["optim.weight_decay"], "optim.lr": LR}, trials, weak)
    assert [one.setting for one in strongest] == ["optim.lr", "optim.weight_decay"]
    two = sensitivities({"optim.lr": LR}, trials[:2], curves)
    assert two[0].correlation is None
