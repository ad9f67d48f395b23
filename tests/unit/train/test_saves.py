"""When a checkpoint is due, by a clock that is not waited for."""

from types import SimpleNamespace
from typing import Any

from trainer.config import parse_config
from trainer.config.run import Checkpoint
from trainer.data.order.settings import Position
from trainer.train.every import DataWindow, Moment
from trainer.train.every.save import Save

MINUTE = 60.0
WINDOW = DataWindow(Position(), Position(bin=1))


class Clock:
    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


def training(rules: Checkpoint, clock: Clock) -> Any:
    quiet = {name: lambda *_, **__: None for name in ("advance", "save", "prove", "finish")}
    return SimpleNamespace(
        start=SimpleNamespace(config=SimpleNamespace(checkpoint=rules)),
        clock=clock,
        engine=None,
        checkpoints=SimpleNamespace(ready=True, **quiet),
        horizon=SimpleNamespace(is_due=lambda per_epoch, begin, end: False),
    )


def saved_at(rules: Checkpoint, minutes: list[float]) -> list[int]:
    """The steps that are saved, where each takes so many minutes, and a save one more."""
    clock, steps = Clock(), list[int]()
    run: Any = training(rules, clock)
    nobody: Any = None
    saves = Save(run, nobody)

    def save(*_: Any, **__: Any) -> None:
        clock.now += MINUTE

    run.checkpoints.save = save
    for step, took in enumerate(minutes, 1):
        clock.now += took * MINUTE
        # The clock of another rank says nothing.
        saves.heard([saves.told(), (1.0, 1e9)])
        if saves.is_due(now := Moment(step, WINDOW)):
            steps.append(step)
            saves.act(now)
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


def test_a_save_that_is_due_so_often_an_epoch_is_due_by_the_data_of_the_update() -> None:
    run = training(Checkpoint(every_steps=0, every_minutes=0, per_epoch=2), Clock())
    run.horizon.is_due = lambda per_epoch, begin, end: (per_epoch, begin, end) == (2, *WINDOW)
    nobody: Any = None
    assert Save(run, nobody).is_due(Moment(3, WINDOW))
    assert not Save(run, nobody).is_due(Moment(4, DataWindow(WINDOW.end, Position(bin=2))))


def test_the_first_update_of_a_start_the_last_state_and_an_evaluation_are_saved_in_any_case() -> None:
    run = training(Checkpoint(every_steps=0, every_minutes=0, keep_best=1), Clock())
    nobody: Any = None
    saves = Save(run, nobody)
    cases = {"first": Moment(3, WINDOW, first=True), "last": Moment(3, WINDOW, last=True), "none": Moment(3, WINDOW)}
    assert {name: saves.is_due(now) for name, now in cases.items()} == {"first": True, "last": True, "none": False}
    assert saves.is_due(Moment(3, WINDOW, evaluated=2.0))
    none_is_best = training(Checkpoint(every_steps=0, every_minutes=0, keep_best=0), Clock())
    assert not Save(none_is_best, nobody).is_due(Moment(3, WINDOW, evaluated=2.0))


def test_the_last_state_is_saved_even_while_an_earlier_save_goes_on() -> None:
    run, asked = training(Checkpoint(), Clock()), list[tuple[int, bool, float | None]]()

    def save(_engine: Any, step: int, _position: Any, *, eval_loss: float | None, may_skip: bool) -> None:
        asked.append((step, may_skip, eval_loss))

    run.checkpoints.save = save
    nobody: Any = None
    saves = Save(run, nobody)
    saves.act(Moment(3, WINDOW, evaluated=2.0))
    saves.act(Moment(4, WINDOW, last=True))
    assert asked == [(3, True, 2.0), (4, False, None)]


def test_the_first_commit_of_a_start_is_read_back_and_the_last_one_waited_for() -> None:
    run, done = training(Checkpoint(), Clock()), list[Any]()
    run.checkpoints.prove = lambda: done.append("read back")
    run.checkpoints.finish = lambda: done.append("waited for")
    run.checkpoints.advance = lambda *, all_ready: done.append(all_ready)
    nobody: Any = None
    saves = Save(run, nobody)
    for now in (Moment(1, WINDOW, first=True), Moment(2, WINDOW), Moment(3, WINDOW, last=True)):
        saves.act(now)
        assert now.saved
        assert done == ["read back", *["waited for"] * now.last]
    saves.heard([(1.0, 5.0), (0.0, 5.0)])
    saves.heard([(1.0, 5.0), (1.0, 5.0)])
    assert done[2:] == [False, True], "a save is done where it is on all ranks"
