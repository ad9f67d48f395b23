"""A run ends by itself when its loss stays high, or when its evaluations no longer get better."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from trainer.config import parse_config
from trainer.config.run import Checkpoint
from trainer.config.training import StopWhen
from trainer.run import layout
from trainer.run.records import encoded
from trainer.state.checkpoint.retention import removable
from trainer.store.store import open_store
from trainer.train.start import Start
from trainer.train.stop_rules import StopRules, open_stop_rules


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
    assert ends_at(StopRules(StopWhen(loss_above=3, loss_steps=2)), [3, 3, 3]) is None, "it is not above"


def test_evaluations_end_the_run_when_the_best_one_is_so_many_back() -> None:
    losses = {2: 1.0, 4: 0.8, 6: 0.9, 8: 0.8, 10: 0.7}
    rules = StopRules(StopWhen(no_better=2))
    assert ends_at(rules, [1.0] * 10, losses) == 8, "an equal one is no better"
    assert rules.ended == (
        "2 evaluations in a row were no better than 0.8000; the checkpoint of step 8 has this loss and is kept"
        " (train.stop_when.no_better)"
    )
    assert ends_at(StopRules(StopWhen(no_better=3)), [1.0] * 10, losses) is None

    losses = {2: 1.0, 4: 0.8, 6: 0.8, 8: 0.9}
    assert ends_at(rules := StopRules(StopWhen(no_better=2)), [1.0] * 8, losses) == 8
    assert "the checkpoint of step 6 has this loss and is kept" in rules.ended
    assert removable(Checkpoint(keep_last=1, keep_best=1), [8, 6, 4, 2], losses) == [4, 2]


@pytest.mark.parametrize("until", [2, 4, 6])
def test_a_resumed_run_ends_where_it_would_have(until: int) -> None:
    losses = {2: 1.0, 4: 0.8, 6: 0.9, 8: 0.8, 10: 0.7}
    before = {step: loss for step, loss in losses.items() if step <= until}
    assert ends_at(StopRules(StopWhen(no_better=2), before), [1.0] * 10, losses, until + 1) == 8


CONFIG = """
run: {name: t}
model: {base: b}
data: {train: [{path: t.jsonl}], eval: [{path: e.jsonl}]}
eval: {every: 2}
checkpoint: {keep_best: 1}
train: {steps: 9, stop_when: {loss_above: 3, loss_steps: 3, no_better: 2}}
"""


def resumed(folder: Path, step: int, *records: dict[str, Any], data: str = "old", config: str = CONFIG) -> StopRules:
    """The rules of a start that goes on from `step`, after one with these records; its evaluation data is `data`."""
    run = open_store(str(folder))
    begun = {
        "kind": "start",
        "step": 0,
        "data": {"train": "t", "eval": "old", "eval.sets.law": "old", "eval.sets.b": "b"},
    }
    run.put(layout.metrics(1), b"".join(map(encoded, (begun, *records))))
    ranks = SimpleNamespace(rank=0, broadcast=lambda value: value)
    return open_stop_rules(
        cast(Start, SimpleNamespace(config=parse_config(config), folder=run, ranks=ranks)), step, data
    )


def test_losses_before_a_resume_count_as_those_behind_it(tmp_path: Path) -> None:
    high = [{"kind": "step", "step": step, "loss": 4.0} for step in (1, 2, 3)]
    assert ends_at(resumed(tmp_path, 2, *high), [4.0, 4.0], first=3) == 3
    assert ends_at(resumed(tmp_path, 2, *high[1:]), [4.0, 4.0], first=3) == 4
    only_high = CONFIG.replace(", no_better: 2", "")
    assert ends_at(resumed(tmp_path, 2, *high, config=only_high), [4.0, 4.0], first=3) == 3
    low = {"kind": "step", "step": 2, "loss": 1.0}
    assert ends_at(resumed(tmp_path, 2, high[0], low), [4.0, 4.0, 4.0], first=3) == 5


def test_evaluations_over_other_data_do_not_count(tmp_path: Path) -> None:
    before = [{"kind": "eval", "step": step, "loss": loss} for step, loss in ((2, 0.1), (4, 0.2))]
    later = {6: 0.9, 8: 0.8}
    assert ends_at(resumed(tmp_path, 4, *before), [1.0] * 4, later, 5) == 6
    assert ends_at(resumed(tmp_path, 4, *before, data="new"), [1.0] * 4, later, 5) is None


def test_what_came_after_the_checkpoint_does_not_count(tmp_path: Path) -> None:
    evals = [{"kind": "eval", "step": step, "loss": loss} for step, loss in ((2, 0.1), (6, 0.01))]
    assert ends_at(resumed(tmp_path, 2, *evals), [1.0] * 8, {4: 0.2, 8: 0.05, 10: 0.04}, 3) is None


def test_a_loss_that_is_no_number_is_the_worst(tmp_path: Path) -> None:
    assert ends_at(StopRules(StopWhen(no_better=2)), [1.0] * 8, {2: math.nan, 4: 0.9, 6: 0.8, 8: 0.7}) is None
    nan = {"kind": "eval", "step": 2, "loss": math.nan}
    assert ends_at(resumed(tmp_path, 2, nan), [1.0] * 8, {4: 0.9, 6: 0.8, 8: 0.7}, 3) is None


def test_without_unnamed_data_the_first_set_counts_alone(tmp_path: Path) -> None:
    config = CONFIG.replace(", eval: [{path: e.jsonl}]", "").replace(
        "eval: {every: 2}", "eval: {every: 2, sets: {law: {path: e.jsonl}, b: {path: b.jsonl}}}"
    )
    law = [{"kind": "eval", "set": "law", "step": step, "loss": loss} for step, loss in ((2, 0.5), (4, 0.6))]
    other = [{"kind": "eval", "set": "b", "step": step, "loss": 0.1} for step in (2, 4)]
    before = [record for pair in zip(law, other, strict=True) for record in pair]
    assert ends_at(resumed(tmp_path, 4, *before, config=config), [1.0] * 4, {6: 0.4, 8: 0.3}, 5) is None
    assert ends_at(resumed(tmp_path, 4, *before, config=config), [1.0] * 4, {6: 0.7, 8: 0.3}, 5) == 6
    held_out = config.replace("train: [{path: t.jsonl}]", "train: [{path: t.jsonl}], held_out: 0.1")
    unnamed = [{"kind": "eval", "step": step, "loss": loss} for step, loss in ((2, 0.1), (4, 0.2))]
    rules = resumed(tmp_path, 4, *before, *unnamed, config=held_out)
    assert ends_at(rules, [1.0] * 4, {6: 0.15, 8: 0.05}, 5) == 6, "rows that are held out of the data have no name"
    at_0 = {"kind": "eval", "set": "law", "step": 0, "loss": 0.1}  # before anything was learnt
    assert ends_at(resumed(tmp_path, 4, at_0, *before, config=config), [1.0] * 4, {6: 0.4, 8: 0.3}, 5) is None
