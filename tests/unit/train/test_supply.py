"""How an update waits for sampled answers, and how the adapter for the servers that sample them is published."""

import json
from contextlib import nullcontext
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


@pytest.mark.parametrize(
    ("engine", "of"),
    [("own", supply._by_ranks), ("serve", supply._by_servers), (["http://a:8000"], supply._by_servers)],
)
def test_ranks_sample_themselves_or_publish_for_servers_whoever_starts_these(
    monkeypatch: pytest.MonkeyPatch, engine: str | list[str], of: Any
) -> None:
    monkeypatch.setattr(supply.Making, "of", lambda *_: "making")
    for rank in (0, 1):
        start: Any = SimpleNamespace(
            config=SimpleNamespace(rollout=SimpleNamespace(engine=engine)),
            ranks=SimpleNamespace(rank=rank, agreeing=nullcontext),
            resolved=None,
            folder=None,
        )
        datasets: Any = SimpleNamespace(train="t", eval=None)
        rollouts: Any = "rollouts"
        found: Any = supply.supply_of(start, datasets, rollouts)
        assert found.func is of
        if engine == "own":
            assert found.args[-1] == ("making" if rank == 0 else None), "rank 0 alone commits"


@pytest.mark.parametrize("committed", [False, True])
def test_answers_that_an_earlier_start_has_sampled_are_not_sampled_again(
    monkeypatch: pytest.MonkeyPatch, committed: bool
) -> None:
    waiting, done = Waiting(monkeypatch, updates=2), list[Any]()
    waiting.rollouts.place, waiting.start.resolved = "place", SimpleNamespace(longest=9)
    making: Any = SimpleNamespace(
        wanted=lambda chapter: [SimpleNamespace(request=f"{chapter}{name}") for name in "ab"],
        commit=lambda chapter, step, wanted, drawn, began: done.append((chapter, step, len(wanted), drawn, began)),
    )

    def sampler(engine: Any, longest: int, alive: Any) -> Any:
        assert (engine, longest) == ("engine", 9)
        alive()
        return SimpleNamespace(sample=str.upper)

    monkeypatch.setattr(supply, "OwnSampler", sampler)
    monkeypatch.setattr(supply, "is_committed", lambda place, chapter: committed and (place, chapter) == ("place", 3))
    engine: Any = "engine"
    assert supply._by_ranks(waiting.start, waiting.rollouts, making, engine, 6)["lag"] == 3
    assert done == ([] if committed else [(3, 6, 2, ["3A", "3B"], 0.0)])
    assert waiting.begun == [*([] if committed else [("evaluate", 0)]), "look"]


def test_what_all_ranks_have_learnt_is_put_together_on_the_first() -> None:
    """Of eight elements over three ranks, the last one has two."""
    values, places = torch.arange(8.0), [(0, 3), (3, 6), (6, 8)]
    told = list[torch.Tensor]()
    for rank in (2, 1, 0):
        begin, end = places[rank]

        def gather_tensor(mine: torch.Tensor, rank: int = rank) -> Any:
            told.insert(0, mine)
            return told if rank == 0 else None

        part = SimpleNamespace(name="w", begin=begin, end=end, shape=(2, 4), states={"master": values[begin:end]})
        ranks = SimpleNamespace(
            rank=rank, device=torch.device("cpu"), gather=lambda *_: places, gather_tensor=gather_tensor
        )
        engine: Any = SimpleNamespace(ranks=ranks, partitions=lambda part=part: [part])
        found = supply._whole(engine, torch.bfloat16)
        assert found.keys() == ({"w"} if rank == 0 else set())
    assert [len(mine) for mine in told] == [3, 3, 3]
    assert torch.equal(found["w"], values.view(2, 4).bfloat16())
