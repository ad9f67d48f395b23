"""When a checkpoint is due, by a clock that is not waited for."""

from trainer.config import parse_config
from trainer.config.run import Checkpoint
from trainer.train.save_rules import SaveRules

MINUTE = 60.0


class Clock:
    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


def saved_at(rules: Checkpoint, minutes: list[float]) -> list[int]:
    """The steps that are saved, where each takes so many minutes, and a save one more."""
    clock, steps = Clock(), list[int]()
    saves = SaveRules(rules, clock)
    for step, took in enumerate(minutes, 1):
        clock.now += took * MINUTE
        if saves.is_due(step, saves.since_save):
            steps.append(step)
            clock.now += MINUTE
            saves.saved()
    return steps


def test_by_default_half_an_hour_after_the_last_save_is_due() -> None:
    given = parse_config("run: {name: a}\nmodel: {base: b}\ndata: {train: [{path: c}]}\ntrain: {steps: 9}\n")
    assert given.checkpoint.every_minutes == 30
    rules = given.checkpoint.model_copy(update={"every_steps": 0})
    assert saved_at(rules, [10] * 9) == [3, 6, 9]  # the minute of a save is not one of those after it
    assert saved_at(rules, [29.9, 0.2, 45, 1, 29]) == [2, 3, 5]


def test_steps_and_minutes_each_make_a_save_due_and_zero_is_never() -> None:
    both = Checkpoint(every_steps=4, every_minutes=30)
    assert saved_at(both, [10] * 8) == [3, 4, 7, 8]
    assert saved_at(Checkpoint(every_steps=4, every_minutes=0), [10] * 8) == [4, 8]
    assert saved_at(Checkpoint(every_steps=0, every_minutes=0), [100] * 8) == []
