"""The order of a run's steps: which data each takes, what follows it, and what ends them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trainer.data.order.order import splitmix64
from trainer.data.order.settings import Position
from trainer.errors import DataError, Interrupted, MachineLeaves, NonFiniteLoss, SlowMachine, Stopped
from trainer.run.requests import MACHINE_LEAVES, Stop
from trainer.train import loop
from trainer.train.every import DataWindow, Moment, Stage
from trainer.train.loop import _follow, _RankStep, _steps, _Update

PART = _RankStep(
    tokens=10, weight=4, stop=0, waited=0.25, repeated=0, samples=2.0**32 + 5, operations=8.0, computed=1.0
)


class Slow:
    """Ranks that are to be replaced after some step."""

    after = 99

    def __init__(self, start: Any) -> None:
        self.steps = list[int]()

    def heard(self, step: int, computed: Any, ranks: Any) -> None:
        self.steps.append(step)

    def own_seconds(self, spent: Any, held_up: Any) -> float:
        return 0.0

    @property
    def to_replace(self) -> bool:
        return self.steps[-1] >= self.after

    def replaced(self, step: int) -> SlowMachine:
        return SlowMachine(f"slow at {step}", [1], ["b"])


class Run:
    """A run of five steps whose data may end before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, data: int = 99, skipped: tuple[int, ...] = ()) -> None:
        self.done, self.written, self.waited = list[Any](), list[Any](), list[float]()
        self.updates, self.windows, self.firsts = list[Any](), list[DataWindow](), list[bool]()
        self.skipped = tuple(Position(bin=place) for place in skipped)
        self.ends, self.newest = 99, 0
        clock = SimpleNamespace(enter=lambda phase: None, passed=dict, held_up=dict)
        self.engine = SimpleNamespace(clock=clock)
        self.start = SimpleNamespace(metrics=SimpleNamespace(write=lambda kind, **of: self.written.append((kind, of))))
        self.horizon = SimpleNamespace(steps=5, passes=lambda position: position.bin / 4)
        self.checkpoints = SimpleNamespace(finish=lambda: self.done.append("finished"))
        self.work = SimpleNamespace(measured=lambda *_: {})
        self.stream = SimpleNamespace(
            rollouts=None, advance=lambda place: replace(place, bin=place.bin + 1), read_from=self.read
        )
        self.supply = lambda engine, step: {"supplied": step}
        self.begin = lambda phase, step: self.done.append((phase, step))
        self.data = data
        self.failure: Exception = DataError("the rest cannot be compiled")
        monkeypatch.setattr(loop, "SlowRanks", Slow)
        monkeypatch.setattr(Slow, "after", 99)
        monkeypatch.setattr(loop, "_update", self.update)
        monkeypatch.setattr(loop, "_follow", self.follow)
        monkeypatch.setattr(
            loop, "_commit_before_the_end", lambda run, step, place: self.done.append((step, place.bin))
        )

    def read(self, position: Position, wait: Any, steps: int, skipped: Any) -> Iterator[Any]:
        self.asked = (position.bin, steps, skipped)
        for place in range(position.bin, self.data):
            yield f"rows {place}"
        raise self.failure

    def update(self, run: Any, actions: Any, batches: Any, step: int, position: Position, **of: Any) -> _Update:
        self.updates.append((step, position.bin, batches))
        self.waited.append(of["waited"])
        return _Update([PART], [], {"loss": 1.0}, {"targets": 4})

    def follow(self, *of: Any, first: bool) -> bool:
        _, _, _, _, step, window = of
        self.windows.append(window)
        self.firsts.append(first)
        self.checkpoints.newest = step
        return step == self.ends

    def records(self, step: int = 0, place: int = 0) -> list[dict[str, Any]]:
        actions: Any = SimpleNamespace(stepped=lambda step: {"acted": step})
        given: Any = self
        return list(_steps(given, actions, step, Position(epoch=1, bin=place)))


def bins(window: DataWindow) -> tuple[int, int]:
    return window.begin.bin, window.end.bin


def test_each_step_takes_the_next_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    records = run.records(2, 7)
    assert run.asked == (7, 3, ())
    assert run.updates == [(2, 7, "rows 7"), (3, 8, "rows 8"), (4, 9, "rows 9")]
    assert [bins(window) for window in run.windows] == [(7, 8), (8, 9), (9, 10)]
    assert run.firsts == [True, False, False]
    assert [(one["step"], one["epoch"], one["acted"], one["supplied"]) for one in records] == [
        (step, 1, step, step - 1) for step in (3, 4, 5)
    ]
    assert [one["passes"] for one in records] == [2.0, 2.25, 2.5]
    assert all(0 <= seconds < 60 for seconds in (*run.waited, *(one["seconds"] for one in records)))
    assert run.done == [("data", step) for step in (3, 4, 5)]


def test_the_epoch_of_a_step_is_that_of_its_rows_though_the_next_begins_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(monkeypatch)
    run.stream.advance = lambda place: replace(place, epoch=place.epoch + (place.bin == 8), bin=place.bin + 1)
    assert [one["epoch"] for one in run.records(2, 7)] == [1, 1, 2]


def test_rows_that_are_passed_over_belong_to_the_next_update(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch)
    run.skipped = (Position(epoch=1, bin=1), Position(epoch=1, bin=2))
    run.horizon.steps = 2
    run.records()
    assert run.updates == [(0, 0, "rows 0"), (1, 3, "rows 3")]
    assert [bins(window) for window in run.windows] == [(0, 1), (1, 4)]
    assert run.written == [("skip", {"step": 1, "window": Position(epoch=1, bin=place).to_json()}) for place in (1, 2)]


@pytest.mark.parametrize(("rows", "steps"), [(0, 0), (1, 1), (2, 2)])
@pytest.mark.parametrize("error", [DataError, Stopped])
def test_data_that_does_not_come_ends_a_run_with_what_it_has_learnt(
    monkeypatch: pytest.MonkeyPatch, rows: int, steps: int, error: type[Exception]
) -> None:
    run = Run(monkeypatch, data=rows)
    run.failure = error("the rest does not come")
    with pytest.raises(error, match="the rest"):
        run.records()
    assert len(run.updates) == steps
    assert run.done[-1] == ((steps, steps) if steps else ("data", 1)), "a start without a step has nothing to commit"


def test_a_run_ends_where_its_rules_say_and_slow_ranks_are_replaced_after_a_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(monkeypatch)
    run.ends = 3
    assert [one["step"] for one in run.records()] == [1, 2, 3]
    run = Run(monkeypatch)
    monkeypatch.setattr(Slow, "after", 2)
    with pytest.raises(SlowMachine, match="slow at 2"):
        run.records()
    assert run.done[-1] == "finished"
    run = Run(monkeypatch)
    monkeypatch.setattr(Slow, "after", 2)
    commits = run.follow

    def not_yet(*of: Any, first: bool) -> bool:
        ended = commits(*of, first=first)
        run.checkpoints.newest = 0
        return ended

    monkeypatch.setattr(loop, "_follow", not_yet)
    assert len(run.records()) == 5


@pytest.mark.parametrize(
    ("step", "asked", "ruled", "last", "ended"),
    [
        (3, Stop.NO, False, [False, False], False),
        (5, Stop.NO, False, [True, True], False),
        (3, Stop.NO, True, [False, True], True),
        (3, Stop.END, False, [True, True], None),
        (5, Stop.END, False, [True, True], False),  # it is over anyway
    ],
)
def test_what_follows_an_update_knows_whether_it_is_the_last(
    monkeypatch: pytest.MonkeyPatch, step: int, asked: Stop, ruled: bool, last: list[bool], ended: bool | None
) -> None:
    done, logged = list[Any](), list[str]()
    monkeypatch.setattr(loop, "_stopped", lambda run, stopping, step: Stopped(f"{stopping!r} at {step}"))

    class Actions:
        def heard(self, told: Any) -> None:
            done.append(told)

        def act(self, now: Moment, *stages: Stage) -> None:
            if Stage.MEASURE in stages:
                now.evaluated = 0.5
            done.append((stages, now.step, now.first, now.last, now.stopping))

    rules = SimpleNamespace(ended="it is good enough", end=lambda *of: done.append(of) or ruled)
    start = SimpleNamespace(log=logged.append)
    run: Any = SimpleNamespace(begin=lambda *of: None, horizon=SimpleNamespace(steps=5), rules=rules, start=start)
    every = [PART, PART._replace(stop=float(asked))]
    update = _Update(every, [[1.0]], {"loss": 2.0}, {})
    actions: Any = Actions()
    window = DataWindow(Position(), Position(bin=1))
    if ended is None:
        with pytest.raises(Stopped, match="Stop.END"):
            _follow(run, actions, update, [], step, window, first=True)
    else:
        assert _follow(run, actions, update, [], step, window, first=True) is ended
    stopping = asked is Stop.END
    assert done == [
        [[1.0]],
        ((Stage.MEASURE,), step, True, last[0], stopping),
        (step, 2.0, 0.5),
        ((Stage.KEEP, Stage.REPORT), step, True, last[1], stopping),
    ]
    assert logged == (["ends at step 3: it is good enough"] if ruled else [])


def updating(monkeypatch: pytest.MonkeyPatch, done: list[Any], *, norm: float = 0.5, loss: float = 3.0) -> Any:
    """The first of two ranks that share rows with pictures, before an update of two rows of its own."""
    engine = SimpleNamespace(seeing_operations=7.0, step=lambda lr: done.append(lr) or norm)

    def gradients(run: Any, batches: Any, step: int, weight: torch.Tensor) -> torch.Tensor:
        done.append((step, float(weight)))
        run.engine.seeing_operations += 100.0
        return torch.tensor([6.0, 1.0], dtype=torch.float64)

    def begin_gather(*mine: float, sums: torch.Tensor) -> Any:
        other = [30.0, 2.0, float(Stop.RESTART), 0.5, 1.0, 9.0, 8.0, 4.0, 70.0, 6 * loss - 6.0, 2.0]
        return lambda: [[*mine, *sums.tolist()], other]

    monkeypatch.setattr(loop, "_gradients", gradients)
    ranks = SimpleNamespace(begin_gather=begin_gather, total=lambda mine: mine + 2.0)
    config = SimpleNamespace(sharding=SimpleNamespace(sequence_parallel=2), optim="the settings")
    objective = SimpleNamespace(weight=lambda row: row.weight, measures=("accuracy",), unit="targets")
    chapters = SimpleNamespace(reads=SimpleNamespace(repeated=3))
    return SimpleNamespace(
        engine=engine,
        start=SimpleNamespace(ranks=ranks, objective=objective, config=config, stop=SimpleNamespace(requested=Stop.NO)),
        begin=lambda *of: done.append(of),
        stream=SimpleNamespace(chapters=chapters, rollouts=None),
        work=SimpleNamespace(of=lambda batches: 8.0 * len(batches)),
        horizon=SimpleNamespace(rate=lambda optim, step: (done.append(optim), step / 1000)[1]),
    )


def rows_of_an_update() -> Any:
    return [SimpleNamespace(tokens=tokens, weight=2, documents=(tokens,), bins=()) for tokens in (10, 5)]


def test_an_update_is_made_of_what_all_ranks_have_and_what_they_say_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done, rows, actions = list[Any](), rows_of_an_update(), SimpleNamespace(told=lambda: [60.0])
    run: Any = updating(monkeypatch, done)
    made = loop._update(run, actions, rows, 4, Position(bin=9), waited=0.25, computed=1.5)  # type: ignore[arg-type]
    assert done == [("step", 5), (4, 6.0), "the settings", 0.005]
    own, other = made.every
    assert own == _RankStep(15, 4, Stop.NO, 0.25, 3, loop.samples_key(rows), 16.0 + 50.0, 1.5)
    assert (other.tokens, other.weight, other.stop, other.computed) == (30.0, 2.0, Stop.RESTART, 4.0)
    assert made.told == [[60.0], [70.0]]
    assert made.figures == {"loss": 3.0, "lr": 0.005, "grad_norm": 0.5}
    assert made.measured == {"targets": 6, "accuracy": 0.5}


@pytest.mark.parametrize(
    ("norm", "loss", "said"),
    [(0.5, math.nan, "the loss of step 5 is nan"), (math.inf, 3.0, "the gradient of step 5 is inf")],
)
@pytest.mark.parametrize("sampled", [False, True])
def test_an_update_by_what_is_no_number_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, norm: float, loss: float, said: str, sampled: bool
) -> None:
    run: Any = updating(monkeypatch, [], norm=norm, loss=loss)
    run.stream.rollouts = "answers" if sampled else None
    actions: Any = SimpleNamespace(told=lambda: [60.0])
    with pytest.raises(NonFiniteLoss, match=said) as raised:
        loop._update(run, actions, rows_of_an_update(), 4, Position(bin=9), waited=0.25, computed=1.5)
    assert raised.value.window == (None if sampled else Position(bin=9).to_json())


def test_a_phase_is_shown_to_those_who_watch_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[Any]()
    clock = SimpleNamespace(enter=lambda phase: done.append(phase))
    run: Any = SimpleNamespace(
        start=SimpleNamespace(pulse=lambda *of: done.append(of)), engine=SimpleNamespace(clock=clock)
    )
    loop.Training.begin(run, "data", 3)
    assert done == [("data", 3), "data"]


def test_whoever_is_to_be_started_again_says_whether_a_machine_leaves() -> None:
    def stopped(asked: Stop, reason: str) -> Stopped:
        ranks = SimpleNamespace(broadcast=lambda mine: mine)
        start = SimpleNamespace(ranks=ranks, stop=SimpleNamespace(reason=reason))
        run: Any = SimpleNamespace(start=start, checkpoints=SimpleNamespace(run=SimpleNamespace(uri="file:///runs/a")))
        return loop._stopped(run, asked, 4)

    assert type(stopped(Stop.RESTART, MACHINE_LEAVES)) is MachineLeaves
    grown = stopped(Stop.RESTART, "for another machine")
    assert type(grown) is Interrupted
    assert str(grown) == "stopped at step 4 for another machine, with a checkpoint committed"
    ended = stopped(Stop.END, "by ann")
    assert type(ended) is Stopped
    assert str(ended).startswith("stopped at step 4 by ann, with a checkpoint committed. `capstan resume ")


def test_a_record_adds_up_the_ranks_and_takes_the_wait_of_the_slowest() -> None:
    run: Any = SimpleNamespace(work=SimpleNamespace(measured=lambda operations, seconds: {"of": (operations, seconds)}))
    other = PART._replace(waited=0.75, tokens=30, samples=2.0**32 - 4, repeated=2, operations=3.0)
    ranks = [PART._replace(repeated=1), other]
    spent = {"step": 1.0, "data": 0.25, "forward": 2.0}
    found = loop._totals(run, ranks, spent, 3.20004)
    assert found == {
        "tokens": 40,
        "samples": "00000001",
        "seconds": 3.2,
        "tokens_per_second": 12.5,
        "of": (11.0, 6.40008),
        "forward_seconds": 2.0,
        "data_seconds": 0.75,
        "exchange_seconds": 0.5,
        "data_repeats": 3,
    }
    assert loop._totals(run, ranks, {}, 4.0)["exchange_seconds"] == 0.0
    given: Any = SimpleNamespace(stream=SimpleNamespace(rollouts=None))
    computed, busy = loop._busy(given, [PART, PART._replace(operations=0.0, waited=2.0)])
    assert computed == [1.0, 1.0]
    assert [(one.computed, one.waited, one.work) for one in busy] == [(0.0, 0.25, 8.0), (0.0, 2.0, 10)]
    given.stream.rollouts = "sampled"
    assert [one.waited for one in loop._busy(given, [PART])[1]] == [0.0]


@dataclass(frozen=True)
class Row:
    """A row whose loss is a multiple of the weight, with one measure."""

    factor: float
    survey: Any = None


@pytest.mark.parametrize("surveyed", [False, True])
def test_gradients_of_rows_are_added_up_and_their_surveys_are_of_all_ranks(surveyed: bool) -> None:
    weight, entered, lasts, seen = torch.tensor(2.0, requires_grad=True), list[str](), list[bool](), list[Any]()
    dropped = list[float]()

    def loss(row: Row) -> torch.Tensor:
        seen.append(None if row.survey is None else row.survey.tolist())
        dropped.append(float(torch.rand(())))
        return torch.stack([row.factor * weight, torch.tensor(row.factor)])

    def backward(loss: torch.Tensor, *, last: bool) -> None:
        lasts.append(last)
        loss.backward()

    modes = list[str]()

    @contextmanager
    def evaluating() -> Iterator[None]:
        modes.append("without dropout")
        yield
        modes.append("with dropout")

    def look(of: Any, row: Row) -> torch.Tensor:
        modes.append("surveyed")
        return of(None, row)

    clock = SimpleNamespace(enter=entered.append, within=lambda phase: nullcontext())
    engine = SimpleNamespace(clock=clock, loss=loss, backward=backward, evaluating=evaluating, look=look)
    survey = SimpleNamespace(sums=1, look=lambda _model, row: torch.tensor([row.factor, 10 * row.factor]))
    ranks = SimpleNamespace(
        rank=0, device=torch.device("cpu"), gather_tensor=lambda mine: torch.stack([mine, torch.full_like(mine, 100.0)])
    )
    objective = SimpleNamespace(survey=survey if surveyed else None, measures=("one",))
    config = SimpleNamespace(run=SimpleNamespace(seed=1))
    run: Any = SimpleNamespace(engine=engine, start=SimpleNamespace(ranks=ranks, objective=objective, config=config))
    rows: Any = [Row(1.0), Row(2.0), Row(4.0)]
    sums = loop._gradients(run, rows, 3, torch.tensor(14.0))
    assert (sums.tolist(), sums.dtype) == ([14.0, 7.0], torch.float64)
    assert weight.grad is not None
    assert float(weight.grad) == pytest.approx(7 / 14)
    assert lasts == [False, False, True]
    assert seen == ([[107.0, 10.0], [107.0, 20.0], [107.0, 40.0]] if surveyed else [None] * 3)
    assert entered == ["forward"] * 4 + ["step"]
    assert modes == (["without dropout", *["surveyed"] * 3, "with dropout"] if surveyed else [])
    assert len(set(dropped)) == 3
    again = list(dropped)
    loop._gradients(run, rows, 3, torch.tensor(14.0))
    assert dropped[3:] == again, "dropout depends on the place in the run alone"


def test_the_documents_and_places_of_a_step_identify_it() -> None:
    def half(*numbers: int) -> int:
        return sum(int(splitmix64(np.array([number], np.uint64))[0]) >> 32 for number in numbers)

    rows: Any = [
        SimpleNamespace(documents=(3, 9), bins=(Position(epoch=2, chapter=3, window=4, bin=5),)),
        SimpleNamespace(documents=(7,), bins=()),
    ]
    assert loop.samples_key(rows) == half(3, 9, 7) + half((2 << 48) + (3 << 40) + (4 << 24) + 5)
