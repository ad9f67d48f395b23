"""What a run does every so many steps: which steps a profile has, and over which updates experts are counted."""

import gzip
import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.config import parse_config, registry
from trainer.data.order.settings import Position
from trainer.errors import StorageError
from trainer.evaluate import losses
from trainer.run import layout
from trainer.store.store import open_store
from trainer.train.every import Action, ActionKind, Actions, DataWindow, Moment, Stage
from trainer.train.every.evaluate import Evaluate
from trainer.train.every.keep import ACTIONS as KEEPS
from trainer.train.every.keep import Keep
from trainer.train.every.profile import ACTIONS, StepProfile
from trainer.train.every.routing import Routing
from trainer.train.every.sample import Sample


@pytest.mark.parametrize(
    ("begins", "last", "begun", "traced"),
    [
        (0, 5, 2, [2, 3]),
        (2, 5, 3, [3]),  # a start that goes on between them
        (0, 2, 2, [2]),  # a run that ends between them
        (3, 5, None, []),
    ],
)
def test_a_profile_has_the_first_to_the_last_step_that_was_asked_for(
    tmp_path: Path, begins: int, last: int, begun: int | None, traced: list[int]
) -> None:
    run, said = open_store(str(tmp_path)), list[str]()
    start: Any = SimpleNamespace(folder=run, log=said.append)
    action = StepProfile((2, 3), start)
    action.begins(begins)
    for step in range(begins + 1, last + 1):
        with torch.profiler.record_function(f"work of step {step}"):
            torch.ones(1).add(1)
        action.stepped(step)
    action.close()
    assert [entry.key for entry in run.list()] == ([] if begun is None else [layout.profile(begun)])
    if begun is not None:
        names = {
            event.get("name", "")
            for event in json.loads(gzip.decompress(run.get(layout.profile(begun))))["traceEvents"]
        }
        found = (re.fullmatch(r"work of step (\d)", name) for name in names)
        assert sorted(int(match[1]) for match in found if match) == traced
        assert f"the steps from {begun} on" in said[0]


def test_a_trace_has_the_shapes_and_one_that_cannot_be_kept_ends_no_run(tmp_path: Path) -> None:
    run = open_store(str(tmp_path))
    for fails in (False, True):
        put = run.put if not fails else lambda *_: (_ for _ in ()).throw(StorageError("the disk is full"))
        start: Any = SimpleNamespace(folder=SimpleNamespace(put=put), log=lambda _: None)
        action = StepProfile((1, 1), start)
        action.begins(0)
        torch.mm(torch.ones(3, 5), torch.ones(5, 7))
        action.stepped(1)
        action.close()
    (entry,) = run.list()
    events = json.loads(gzip.decompress(run.get(entry.key)))["traceEvents"]
    assert [[3, 5], [5, 7]] in [event.get("args", {}).get("Input Dims") for event in events]


def test_the_first_rank_alone_keeps_a_trace() -> None:
    tree = "{run: {name: a}, model: {base: /b}, data: {train: [{path: c}]}, train: {steps: 9%s}}"
    for profile, rank, kept in ((", profile: [2, 3]", 0, True), (", profile: [2, 3]", 1, False), ("", 0, False)):
        start = SimpleNamespace(
            config=parse_config(tree % profile), ranks=SimpleNamespace(rank=rank), folder=None, log=print
        )
        run: Any = SimpleNamespace(start=start)
        assert bool(ACTIONS["profile"].opens(run, run)) is kept


class _Experts:
    """A mixture's experts that count as trainer/model/experts.py does."""

    each = 2

    def __init__(self) -> None:
        self.counts = torch.zeros(4, dtype=torch.long)

    @property
    def visits(self) -> torch.Tensor:
        return self.counts

    @visits.setter
    def visits(self, value: Any) -> None:
        self.counts = torch.zeros(4, dtype=torch.long) + value


def test_experts_are_counted_since_the_last_save_and_an_evaluation_counts_for_itself() -> None:
    written, experts = list[tuple[int, str, list[float]]](), _Experts()
    metrics = SimpleNamespace(
        write=lambda kind, *, step, of, shares: written.append((step, of, shares["mlp"])),
    )
    start: Any = SimpleNamespace(ranks=SimpleNamespace(total=lambda counts: counts), metrics=metrics)
    action = Routing({"mlp": experts}, start)

    def visit(*visits: int) -> None:
        experts.visits = experts.visits + torch.tensor(visits)

    visit(8, 0, 4, 4)
    assert action.stepped(1) == {"expert_load": 8 / 4, "experts_unused": 1}
    visit(0, 8, 8, 0)
    assert action.stepped(2) == {"expert_load": 8 / 4, "experts_unused": 2}
    visit(4, 4, 4, 4)
    assert action.evaluated(2, "eval") == {"expert_load": 1.0, "experts_unused": 0}
    action.act(Moment(2, saved=True))
    visit(16, 0, 0, 0)
    action.stepped(3)
    action.act(Moment(3, saved=True))
    # A token visits two experts, so the shares of a layer add up to 2.
    assert written == [
        (2, "eval", [0.5, 0.5, 0.5, 0.5]),
        (2, "train", [0.5, 0.5, 0.75, 0.25]),
        (3, "train", [2.0, 0.0, 0.0, 0.0]),
    ]


def test_each_layer_has_the_counts_of_its_own_experts_and_is_told_with_a_save_alone() -> None:
    written, layers = list[Any](), {"first": _Experts(), "second": _Experts()}
    metrics = SimpleNamespace(write=lambda kind, *, step, of, shares: written.append(shares))
    start: Any = SimpleNamespace(ranks=SimpleNamespace(total=lambda counts: counts), metrics=metrics)
    action = Routing(layers, start)
    layers["first"].visits = torch.tensor([4, 4, 4, 4])
    layers["second"].visits = torch.tensor([8, 8, 0, 0])
    assert action.stepped(1) == {"expert_load": 2.0, "experts_unused": 2}, "of the layer with the busiest expert"
    assert [action.is_due(Moment(1, last=True, saved=saved)) for saved in (False, True)] == [False, True]
    action.act(Moment(1, saved=True))
    assert written == [{"first": [0.5, 0.5, 0.5, 0.5], "second": [1.0, 1.0, 0.0, 0.0]}]


def test_prompts_are_answered_every_so_many_steps_and_at_the_end() -> None:
    run: Any = SimpleNamespace(horizon=SimpleNamespace(steps=7))
    samples: Any = None

    def due(**now: Any) -> list[int]:
        return [step for step in range(8) if Sample(run, samples, 3).is_due(Moment(step, **now))]

    assert due() == [0, 3, 6, 7]
    assert due(stopping=True) == [7]
    run = SimpleNamespace(engine="engine", begin=lambda *phase: done.append(phase))
    samples, done = SimpleNamespace(take=lambda engine, step, begin: done.append((engine, step))), list[Any]()
    Sample(run, samples, 3).act(Moment(6))
    assert done == [("evaluate",), ("engine", 6), ("save", 6)], "each phase has a time limit of its own"


def test_the_loss_that_decides_is_that_of_the_first_set_and_its_record_the_newest() -> None:
    written = list[tuple[str, float]]()
    stream = {
        name: SimpleNamespace(epoch=lambda _, nats=nats: iter([[SimpleNamespace(documents=(0,), nats=nats)]]))
        for name, nats in (("legal", 6.0), ("general", 2.0))
    }
    run: Any = SimpleNamespace(
        begin=lambda *_: None,
        engine=SimpleNamespace(
            ranks=SimpleNamespace(gather=lambda *values: [values]),
            evaluating=nullcontext,
            look=lambda _, row: torch.tensor([[row.nats], [4.0]]),
        ),
        eval_sets=stream,
        eval_stream=None,
        start=SimpleNamespace(metrics=SimpleNamespace(write=lambda _, **of: written.append((of["set"], of["loss"])))),
    )
    actions: Any = SimpleNamespace(evaluated=lambda step, split: {})
    Evaluate(run, actions).act(now := Moment(4))
    assert written == [("general", 0.5), ("legal", 1.5)]
    assert now.evaluated == 1.5


def test_an_evaluation_is_due_by_the_steps_by_the_data_and_at_the_end() -> None:
    rules = SimpleNamespace(every=3, per_epoch=2, between=True)
    horizon = SimpleNamespace(
        steps=7, is_due=lambda per_epoch, begin, end: (per_epoch, begin.bin, end.bin) == (2, 4, 5)
    )
    run: Any = SimpleNamespace(horizon=horizon, start=SimpleNamespace(config=SimpleNamespace(eval=rules)))
    actions: Any = None
    evaluate = Evaluate(run, actions)

    def due(**now: Any) -> list[int]:
        return [
            step
            for step in range(1, 8)
            if evaluate.is_due(Moment(step, DataWindow(Position(bin=step - 1), Position(bin=step)), **now))
        ]

    assert due() == [3, 5, 6, 7]
    assert due(stopping=True) == [7]
    assert evaluate.is_due(Moment(0))
    rules.between = False
    assert not evaluate.is_due(Moment(0))


def test_the_data_without_a_name_decides_before_any_set(monkeypatch: pytest.MonkeyPatch) -> None:
    written, begun = list[Any](), list[Any]()
    stream: Any = SimpleNamespace(epoch=lambda _: iter([[SimpleNamespace(documents=(0,))]]))
    run: Any = SimpleNamespace(
        begin=lambda *of: begun.append(of),
        engine=SimpleNamespace(
            ranks=SimpleNamespace(gather=lambda *values: [values]),
            evaluating=nullcontext,
            look=lambda _, row: torch.tensor([[6.0], [4.0]]),
        ),
        eval_sets={"legal": stream},
        eval_stream=stream,
        start=SimpleNamespace(metrics=SimpleNamespace(write=lambda _, **of: written.append(of))),
    )
    monkeypatch.setattr(Evaluate, "_objective_means", lambda self, stream: {"loss": 2.5, "targets": 4})
    actions: Any = SimpleNamespace(evaluated=lambda step, split: {"experts_unused": 0})
    Evaluate(run, actions).act(now := Moment(4))
    assert written == [
        {"step": 4, "set": "legal", "loss": 1.5, "tokens": 4, "experts_unused": 0},
        {"step": 4, "loss": 2.5, "targets": 4, "experts_unused": 0},
    ]
    assert now.evaluated == 2.5
    assert begun == [("evaluate",), ("save", 4)]


def test_a_mean_over_evaluation_data_is_taken_without_dropout_and_each_row_shows_that_the_run_is_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done = list[Any]()

    @contextmanager
    def evaluating() -> Iterator[None]:
        done.append("without dropout")
        yield
        done.append("with dropout")

    def means(ranks: Any, objective: Any, rows: Any, loss: Any) -> tuple[dict[str, float], int]:
        return {"loss": sum(loss(row) for row in rows)}, 9

    @dataclass
    class Row:
        nats: float
        survey: Any = None

    monkeypatch.setattr(losses, "objective_means", means)
    engine = SimpleNamespace(evaluating=evaluating, loss=lambda row: done.append(torch.is_grad_enabled()) or row.nats)
    objective = SimpleNamespace(survey=None, unit="pairs")
    run: Any = SimpleNamespace(
        begin=lambda *of: done.append(of), engine=engine, start=SimpleNamespace(ranks=None, objective=objective)
    )
    stream: Any = SimpleNamespace(epoch=lambda _: iter([[Row(1.0)], [Row(2.0)]]))
    actions: Any = None
    assert Evaluate(run, actions)._objective_means(stream) == {"loss": 3.0, "pairs": 9}
    assert done == [
        "without dropout",
        *(("evaluate",), False),
        *(("evaluate",), False),
        "with dropout",
    ]


class _Says(Action):
    """Tells as many numbers as its name has letters, and remembers what it hears and when it acts."""

    def __init__(self, name: str, stage: Stage, done: list[Any], figures: dict[str, float] | None = None) -> None:
        self.name, self.stage, self.done, self.figures = name, stage, done, figures

    def begins(self, step: int) -> None:
        self.done.append(("begins", self.name, step))

    def told(self) -> tuple[float, ...]:
        return tuple(float(len(self.name)) for _ in self.name)

    def heard(self, ranks: Any) -> None:
        self.done.append((self.name, [list(rank) for rank in ranks]))

    def stepped(self, step: int) -> dict[str, float]:
        return {f"{self.name}_seconds": step}

    def evaluated(self, step: int, of: str) -> dict[str, float]:
        return {self.name: step}

    def is_due(self, now: Moment) -> bool:
        return now.step != 4

    def act(self, now: Moment) -> dict[str, float] | None:
        self.done.append((self.name, now.step))
        return self.figures

    def close(self) -> None:
        self.done.append(("closes", self.name))


def test_actions_act_in_the_order_of_their_stages_and_hear_what_they_have_told(monkeypatch: pytest.MonkeyPatch) -> None:
    done, written = list[Any](), list[Any]()
    made = {
        "a": _Says("a", Stage.REPORT, done, {"x": 1.0}),
        "bb": _Says("bb", Stage.MEASURE, done),
        "ccc": _Says("ccc", Stage.KEEP, done),
        "dd": _Says("dd", Stage.KEEP, done, {}),
        "none": None,
    }
    known = {name: ActionKind(lambda run, actions, action=action: action) for name, action in made.items()}
    monkeypatch.setattr(registry, "kinds", lambda package, table: known)
    metrics = SimpleNamespace(write=lambda kind, **of: written.append((kind, of)))
    run: Any = SimpleNamespace(start=SimpleNamespace(metrics=metrics))
    actions = Actions(run)
    actions.begins(2)
    order = ["bb", "ccc", "dd", "a"]
    assert done == [("begins", name, 2) for name in order]
    done.clear()
    actions.begins(0)
    assert done == [*(("begins", name, 0) for name in order), ("bb", 0)], "what is measured, before the first step"
    assert actions.told() == [2, 2, 3, 3, 3, 2, 2, 1]
    done.clear()
    actions.heard([list(range(8)), list(range(10, 18))])
    assert done == [
        ("bb", [[0, 1], [10, 11]]),
        ("ccc", [[2, 3, 4], [12, 13, 14]]),
        ("dd", [[5, 6], [15, 16]]),
        ("a", [[7], [17]]),
    ]
    done.clear()
    for step in (3, 4):
        actions.act(Moment(step), Stage.KEEP, Stage.REPORT)
    assert done == [("ccc", 3), ("dd", 3), ("a", 3)]
    assert written == [
        ("measured", {"by": "dd", "step": 3}),
        ("measured", {"by": "a", "step": 3, "x": 1.0}),
    ]
    for step in (3, 0):
        assert actions.stepped(step) == {f"{name}_seconds": step for name in order}
        assert actions.evaluated(step, "eval") == dict.fromkeys(order, step)
    done.clear()
    actions.close()
    assert done == [("closes", name) for name in order]


class _Memory:
    """Memory that outlives a rank, in which updates may be wrong."""

    def __init__(self) -> None:
        self.wrong, self.again, self.waited = set[int](), 0, 0

    def arrived(self) -> None:
        self.waited += 1

    def is_sound(self, step: int) -> bool:
        return step not in self.wrong

    def sent_again(self) -> int:
        return self.again


@pytest.mark.parametrize(
    ("memory", "share", "looks"), [(None, "0.5", None), ("there", "0.01", True), ("there", "0", False)]
)
def test_updates_are_kept_where_memory_outlives_a_rank_and_looked_at_if_anything_is(
    memory: str | None, share: str, looks: bool | None
) -> None:
    config = parse_config(
        "run: {name: a}\nmodel: {base: b}\ndata: {train: [{path: c}]}\ntrain: {steps: 1}", [f"train.look_share={share}"]
    )
    run: Any = SimpleNamespace(checkpoints=SimpleNamespace(memory=memory), start=SimpleNamespace(config=config))
    actions: Any = None
    found: Any = KEEPS["keep"].opens(run, actions)
    assert (found and found._looks) is looks


def test_an_update_that_is_kept_wrongly_is_kept_again_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, written, asked = list[Any](), list[Any](), list[Any]()
    memory: Any = _Memory()
    clock = count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock) / 8)
    start = SimpleNamespace(
        starter=SimpleNamespace(machine="a"),
        ranks=SimpleNamespace(gather_objects=lambda mine: asked.append(mine) or [mine, "b"]),
        metrics=SimpleNamespace(write=lambda kind, **of: written.append((kind, of))),
    )
    checkpoints = SimpleNamespace(memory=memory, keep=lambda engine, step, position: kept.append((step, position)))
    run: Any = SimpleNamespace(start=start, engine=None, checkpoints=checkpoints)
    keep, careless = Keep(run, looks=True), Keep(run, looks=False)
    assert keep.told() == (0.0, 0.0)
    window = DataWindow(Position(), Position(bin=3))
    for action in (keep, careless):
        assert action.is_due(Moment(3))
        action.act(Moment(3, window))
    position = window.end.to_json()
    assert kept == [(3, position)] * 2
    memory.again = 1
    assert keep.told() == (0.0, 1.0)
    memory.wrong.add(3)
    before = memory.waited
    assert careless.told() == (0.0, 1.0)
    assert memory.waited == before + 1
    assert keep.told() == (1.0, 1.0)
    assert (memory.waited, kept[2:]) == (before + 3, [(3, position)]), "it is waited for that, too"
    assert keep.stepped(4) == {"keep_seconds": 0.5}, "an eighth for each call"
    assert keep.stepped(5) == {"keep_seconds": 0.0}
    keep.heard([(0.0, 0.0), (0.0, 0.0)])
    assert (written, asked) == ([], [])
    keep.heard([(1.0, 0.0), (0.0, 2.0)])
    facts = {"step": 4, "since": 3, "tensor": "what learns"}
    assert written == [
        ("wrong_bytes", {"rank": 0, "machine": "a", "where": "kept", **facts}),
        ("wrong_bytes", {"rank": 1, "machine": "b", "where": "copied", **facts}),
    ]
