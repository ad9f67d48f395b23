"""What a run does every so many steps: which steps a profile has, and over which updates experts are counted."""

import gzip
import json
import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.data.order.settings import Position
from trainer.run import layout
from trainer.store.store import open_store
from trainer.train.every import DataWindow, Moment
from trainer.train.every.evaluate import Evaluate
from trainer.train.every.keep import Keep
from trainer.train.every.profile import StepProfile
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


def test_prompts_are_answered_every_so_many_steps_and_at_the_end() -> None:
    run: Any = SimpleNamespace(horizon=SimpleNamespace(steps=7))
    samples: Any = None

    def due(**now: Any) -> list[int]:
        return [step for step in range(8) if Sample(run, samples, 3).is_due(Moment(step, **now))]

    assert due() == [0, 3, 6, 7]
    assert due(stopping=True) == [7]


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


def test_an_update_that_is_kept_wrongly_is_kept_again_and_said() -> None:
    kept, written = list[Any](), list[Any]()
    memory: Any = _Memory()
    start = SimpleNamespace(
        starter=SimpleNamespace(machine="a"),
        ranks=SimpleNamespace(gather_objects=lambda mine: [mine, "b"]),
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
    assert keep.stepped(4).keys() == {"keep_seconds"}
    assert keep.stepped(5) == {"keep_seconds": 0.0}
    keep.heard([(0.0, 0.0), (0.0, 0.0)])
    assert written == []
    keep.heard([(1.0, 0.0), (0.0, 2.0)])
    facts = {"step": 4, "since": 3, "tensor": "what learns"}
    assert written == [
        ("wrong_bytes", {"rank": 0, "machine": "a", "where": "kept", **facts}),
        ("wrong_bytes", {"rank": 1, "machine": "b", "where": "copied", **facts}),
    ]
