"""How an update waits for sampled answers, and how the adapter for the servers that sample them is published."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from trainer.errors import CapstanError, Stopped
from trainer.run import layout
from trainer.store.store import Store, open_store
from trainer.train import supply
from trainer.tuning.linear_adapters import PEFT_SETTINGS, PEFT_WEIGHTS


class Waiting:
    """The first of two ranks, whose chapter of answers is there after some looks."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, ready_after: int = 0, *, updates: int = 1, stops: bool = False
    ) -> None:
        self.looks, self.now, self.written, self.begun = 0, 0.0, list[Any](), list[Any]()
        self.gone: Exception | None = None
        self.ready_after = ready_after
        figures = {"reward": 0.5, "sampling_seconds": 9.0, "reward_seconds": 1.0, "held_out_reward": 0.25, "adapter": 3}
        self.rollouts: Any = SimpleNamespace(
            is_ready=self.is_ready,
            figures=lambda chapter: dict(figures),
            chapters=SimpleNamespace(look=lambda: self.begun.append("look")),
        )
        ranks = SimpleNamespace(
            rank=0,
            gather=lambda there, stop: [(float(there), float(stop)), (0.0, float(stops))],
            on_first=lambda action: action(),
        )
        rollout = SimpleNamespace(updates=updates, chapter=lambda step: step // updates)
        self.start: Any = SimpleNamespace(
            ranks=ranks,
            config=SimpleNamespace(rollout=rollout),
            stop=SimpleNamespace(requested=0),
            folder=None,
            pulse=lambda *of: self.begun.append(of),
            metrics=SimpleNamespace(write=lambda kind, **of: self.written.append((kind, of))),
        )
        monkeypatch.setattr(supply, "given_up", lambda folder: self.gone)
        monkeypatch.setattr(supply.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(supply.time, "sleep", self.sleep)

    def is_ready(self, chapter: int) -> bool:
        self.looks += 1
        return self.looks > self.ready_after

    def sleep(self, seconds: float) -> None:
        self.now += 10.0

    def figures(self, step: int) -> Any:
        return supply._ready(self.start, self.rollouts, step)


def test_the_first_update_of_a_chapter_says_how_long_its_answers_took(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting(monkeypatch, updates=2)
    assert waiting.figures(4) == {
        "reward": 0.5,
        "sampling_seconds": 9.0,
        "reward_seconds": 1.0,
        "held_out_reward": 0.25,
        "lag": 1,
    }
    assert waiting.figures(5) == {"reward": 0.5, "lag": 2}
    assert waiting.begun == ["look", "look"]


def test_a_rank_that_waits_for_answers_says_so_now_and_then_and_shows_that_it_is_alive(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting = Waiting(monkeypatch, ready_after=9)
    waiting.figures(4)
    assert waiting.begun == [("compile", 5)] * 9 + ["look"]
    assert waiting.written == [("waiting", {"step": 4, "what": "answers"})] * 2


def test_whoever_asks_for_a_stop_or_gives_up_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Stopped, match="stopped at step 4, while answers were waited for"):
        Waiting(monkeypatch, 99, stops=True).figures(4)
    alone = Waiting(monkeypatch, 99)
    alone.gone = CapstanError("the servers cannot be started")
    with pytest.raises(CapstanError, match="cannot be started"):
        alone.figures(4)


class Files:
    """What a method exports: an adapter of linear layers, or with experts."""

    def __init__(self, experts: bool) -> None:
        settings = {"r": 4, "target_parameters": ["mlp.experts"] if experts else None}
        self.files = {PEFT_SETTINGS: json.dumps(settings).encode(), PEFT_WEIGHTS: save({"a": torch.ones(1)})}


def published(
    monkeypatch: pytest.MonkeyPatch, place: Store, step: int, *, experts: bool = False, lag: int = 1
) -> list[Any]:
    done = list[Any]()

    def whole(engine: Any, dtype: torch.dtype) -> dict[str, Any]:
        done.append(dtype)
        return {"learnt": 1}

    monkeypatch.setattr(supply, "_whole", whole)
    monkeypatch.setattr(supply, "per_expert_files", lambda files, model: {**files, "by expert": b"1"})
    monkeypatch.setattr(
        supply, "for_whole_class", lambda files, model: {f"{name} of the class": b"1" for name in files}
    )
    model = SimpleNamespace(dtype="bf16")
    config = SimpleNamespace(model=model, rollout=SimpleNamespace(lag=lag))
    resolved: Any = SimpleNamespace(config=config, method=SimpleNamespace(export=lambda weights, model: Files(experts)))
    engine: Any = SimpleNamespace(ranks=SimpleNamespace(on_first=lambda action: action()))
    supply.publish(place, engine, resolved, step)
    return done


def test_an_adapter_is_published_once_under_the_names_of_the_class_and_expert_by_expert(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place, written = open_store(str(tmp_path)), list[str]()
    put = Store.put
    monkeypatch.setattr(Store, "put", lambda store, key, data: (written.append(key), put(store, key, data))[1])
    assert published(monkeypatch, place, 4) == [torch.bfloat16]
    names = [f"{layout.rollout_adapter(4)}{name} of the class" for name in (PEFT_SETTINGS, PEFT_WEIGHTS)]
    assert written == [*names, layout.published(4)], "the word that it is whole comes last"
    assert published(monkeypatch, place, 4) == []
    published(monkeypatch, place, 5, experts=True)
    assert place.exists(f"{layout.rollout_adapter(5)}by expert of the class")


def test_adapters_that_no_answer_may_be_of_any_more_are_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place = open_store(str(tmp_path))
    for step in range(6):
        published(monkeypatch, place, step, lag=1)
    # The next update, 6, may take answers of the adapter of 5 - 1; one more stays for a server that reads it just now.
    assert [step for step in range(6) if place.exists(layout.published(step))] == [3, 4, 5]
