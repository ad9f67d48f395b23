"""A rank's start, with stand-ins for what it assembles: what it writes, what it keeps, and what it passes over."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer import rank
from trainer.data.order.settings import Position
from trainer.run import layout
from trainer.state.checkpoint.checkpoints import CommitHooks
from trainer.train.features import KeptFeatures

ANY: Any = None


def begun(number: int = 0, **more: Any) -> Any:
    """The start of the rank with this number, in the third generation of its run."""
    ranks = SimpleNamespace(
        rank=number, device=torch.device("cpu"), device_name="cpu", on_first=lambda action: action(), broadcast=list
    )
    return SimpleNamespace(ranks=ranks, generation=3, folder="the folder", **more)


@pytest.mark.parametrize(("number", "shards"), [(0, ["a shard"]), (1, [])])
def test_a_start_writes_each_step_and_at_which_it_ended(
    number: int, shards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written, observed, told = list[tuple[str, dict[str, Any]]](), list[dict[str, Any]](), list[Any]()
    start = begun(
        number,
        metrics=SimpleNamespace(write=lambda kind, **facts: written.append((kind, facts))),
        starter=SimpleNamespace(observe=observed.append),
        elapsed=SimpleNamespace(seconds={"load": 2.0}),
    )
    closed = list[str]()
    training: Any = SimpleNamespace(
        horizon=SimpleNamespace(steps=100),
        stream=SimpleNamespace(chapters=SimpleNamespace(close=lambda: closed.append("chapters"))),
        rules=SimpleNamespace(ended="it learns nothing more"),
    )
    restored: Any = SimpleNamespace(step=4, position={"bin": 40}, shards=shards)

    @contextmanager
    def metered(device: torch.device, *, reads: bool) -> Iterator[Any]:
        told.append(reads)
        yield lambda: {"watts": 7.0}

    def train(given: Any, step: int, position: Position) -> Iterator[dict[str, Any]]:
        assert (given, step, position) == (training, 4, Position.from_json({"bin": 40}))
        yield from ({"step": step, "loss": 1.0} for step in (5, 6))

    monkeypatch.setattr(rank, "stop_before_training", lambda *_, committed: told.append(committed))
    monkeypatch.setattr(rank, "metered", metered)
    monkeypatch.setattr(rank, "train", train)
    monkeypatch.setattr(rank, "unlike_sampler", lambda record: None)
    rank._train(start, training, restored)
    assert told == [bool(shards), number == 0], "what memory has is not committed; one rank reads the power"
    assert [kind for kind, _ in written] == ["phase", "first_step", "step", "step", "end"]
    assert written[1][1] == {"step": 5, "seconds": {"load": 2.0}}
    assert written[2][1].items() >= {"step": 5, "loss": 1.0, "watts": 7.0}.items()
    assert written[-1][1] == {"outcome": "finished", "step": 6, "reason": "it learns nothing more"}
    assert [(record["step"], record["restarts"]) for record in observed] == [(5, 2), (6, 2)]
    assert closed == ["chapters"]


@pytest.mark.parametrize(("number", "skips"), [(0, True), (0, False), (1, True)])
def test_windows_that_were_bad_are_passed_over_where_the_settings_say_so(
    number: int, skips: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 reads of them for all."""
    monkeypatch.setattr(rank, "bad_windows", lambda folder: [{"bin": 7}])
    for name in ("recomputed_share", "work_of", "open_stop_rules"):
        monkeypatch.setattr(rank, name, lambda *_: None)
    monkeypatch.setattr(rank, "horizon_of", lambda *given: given[-1])
    monkeypatch.setattr(rank, "Training", SimpleNamespace)
    base = SimpleNamespace(architecture=None)
    start = begun(
        number,
        config=SimpleNamespace(train=None, retry=SimpleNamespace(skip_bad_window=skips)),
        resolved=SimpleNamespace(base=base),
    )
    rows: Any = SimpleNamespace(train=SimpleNamespace(rollouts=None), held_out=None, sets={})
    anything: Any = SimpleNamespace(model=None, refill=None, evaluated=None, epochs=())
    made = rank._training(start, anything, anything, rows, anything, anything, (4, Position()))
    assert made.skipped == made.horizon == ((Position.from_json({"bin": 7}),) if skips and number == 0 else ())


@pytest.mark.parametrize("answers", [False, True])
def test_a_run_that_learns_from_its_answers_goes_on_from_checkpoints_alone(
    answers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers after a checkpoint are made by the model that it has. Older ones go with the checkpoints."""
    monkeypatch.setattr(rank, "keep_text", lambda *_: None)
    monkeypatch.setattr(rank, "run_text", lambda *_: None)
    monkeypatch.setattr(rank, "Checkpoints", lambda *given, memory: (given, memory))
    rollout = SimpleNamespace(chapter=lambda step: step // 4)
    resolved = SimpleNamespace(
        config=SimpleNamespace(rollout=rollout, checkpoint="rules", data=None),
        base=SimpleNamespace(directory=None),
        identity=lambda dataset: f"that of {dataset}",
    )
    start = begun(resolved=resolved, metrics=SimpleNamespace(write_now="record", flush="flush"), after_commit="after")
    forgotten = list[int]()
    rollouts: Any = SimpleNamespace(forget_before=forgotten.append) if answers else None
    datasets: Any = SimpleNamespace(train="data", evaluated="held out")
    memory: Any = "memory"
    given, kept = rank._checkpoints(start, datasets, rollouts, memory)  # type: ignore[misc]
    hooks: CommitHooks = given[5]
    assert (given[0], given[2:5], given[6]) == ("the folder", (3, "that of data", "rules"), "held out")
    assert (hooks.record, hooks.before, hooks.after) == ("record", "flush", "after")
    hooks.oldest(12)
    assert (kept, forgotten) == ((None, [3]) if answers else ("memory", []))


@pytest.mark.parametrize("whole", [True, False, None])
def test_streams_read_kept_features_if_all_are_there(whole: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, over = list[list[str]](), list[tuple[str, str]]()

    def stream(name: str, sees: bool = True) -> Any:
        pictures = SimpleNamespace(over=lambda files: over.append((name, files))) if sees else None
        return SimpleNamespace(pictures=pictures, chapters="chapters", name=name)

    def kept(start: Any, attention: Any, datasets: list[str], chapters: Any) -> Any:
        asked.append(datasets)
        return None if whole is None else SimpleNamespace(files="the files", whole=whole)

    monkeypatch.setattr(rank, "kept_features", kept)
    rows: Any = SimpleNamespace(
        train=stream("train"), held_out=stream("eval"), sets={"a": stream("a"), "b": stream("b", sees=False)}
    )
    datasets: Any = SimpleNamespace(train="t", eval="e", sets={"a": "e", "b": "t", "c": "c"})
    rank._keep_features(begun(), ANY, datasets, rows)
    assert asked == [["t", "e", "c"]], "each data set once"
    assert over == ([(name, "the files") for name in ("train", "eval", "a")] if whole else [])


@pytest.mark.parametrize("held_out", [True, False])
def test_the_reference_is_read_for_the_rows_and_for_those_that_are_held_out(held_out: bool) -> None:
    reference: Any = SimpleNamespace(log_probabilities=lambda dataset, chapters=None: (dataset, chapters))
    rows: Any = SimpleNamespace(
        train=SimpleNamespace(chapters="chapters"), held_out=SimpleNamespace() if held_out else None
    )
    datasets: Any = SimpleNamespace(train="t", eval="e" if held_out else None)
    rank._read_reference(reference, datasets, rows)
    assert rows.train.reference == ("t", "chapters")
    if held_out:
        assert rows.held_out.reference == ("e", None)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize(
    ("features", "restored", "sources", "source"),
    [
        (None, None, [], None),
        (True, ["a shard"], [], "checkpoint"),
        (False, [], ["memory", "memory"], "memory"),
        (True, [], ["memory", "neighbour"], "neighbour"),
    ],
)
def test_a_start_checks_the_base_reads_the_reference_and_says_where_its_state_comes_from(
    resume: bool,
    features: bool | None,
    restored: list[str] | None,
    sources: list[str],
    source: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done, said, recorded = list[Any](), list[str](), dict[str, Any]()
    the_files: Any = "f"
    beginning = SimpleNamespace(begun=resume)
    cluster = SimpleNamespace(keeper=True)
    resolved = SimpleNamespace(
        base="base", config=SimpleNamespace(cluster=cluster), beginning=beginning, reference="stored"
    )
    kept = SimpleNamespace(shares="shares", updates="updates") if sources else None
    start = begun(resolved=resolved, log=said.append, starter=SimpleNamespace(kept=kept))
    start.folder = SimpleNamespace(put=lambda key, data: done.append(key))
    start.ranks.world, start.ranks.gather_objects = "world", lambda mine: sources
    manifest = None if restored is None else SimpleNamespace(step=4, position={"bin": 4}, shards=restored)

    def restore(engine: Any, *, required: bool, log: Any) -> Any:
        done.append("restore")
        assert required is resume
        return manifest

    memory = SimpleNamespace(source="memory") if sources else None
    stands_in: dict[str, Any] = {
        "environment": lambda ranks: b"the environment",
        "check_same_base": lambda base, world: done.append((base, world)),
        "_rows": lambda *_: SimpleNamespace(train=SimpleNamespace(rollouts=None, accumulation=2)),
        "attention_of": lambda *_: SimpleNamespace(name="sdpa", why="it is there"),
        "told_exports": lambda *_: ["a sentence"],
        "_keep_features": lambda *_: None if features is None else KeptFeatures(the_files, frozenset("w"), features),
        "settle": lambda resolved, *_: resolved,
        "choose_sharding": lambda *_: "sharding",
        "assemble": lambda *given: (done.append(given[-1]) or "engine", SimpleNamespace(kernels="liger")),
        "begin_from": lambda *_: done.append("begin"),
        "ReferencePass": lambda start, engine, kernels, files: (kernels, files),
        "_read_reference": lambda reference, *_: done.append(reference),
        "_checkpoints": lambda *_: SimpleNamespace(restore=restore, memory=memory),
        "_training": lambda *_: SimpleNamespace(horizon=SimpleNamespace(steps=9)),
        "record_start": lambda start, report, **facts: recorded.update(facts),
        "record_plan": lambda *_: done.append("plan"),
        "record_changes": lambda *_: done.append("changes"),
    }
    for name, value in stands_in.items():
        monkeypatch.setattr(rank, name, value)
    datasets: Any = SimpleNamespace(train="t", eval="e", sets={"code": "c"})
    assert rank._assemble(start, datasets, resume=resume)[1] is manifest
    assert done == [
        *(layout.ENVIRONMENT, ("base", "world"), None if features is None else frozenset("w")),
        *([] if resume else ["begin"]),
        *([] if features is False else [("sdpa and liger", features and "f")]),
        *("restore", "plan", "changes"),
    ]
    assert said == [
        *("attention: sdpa (it is there)", "a sentence"),
        *([] if kept else ["cluster.keeper: true has no effect here: no keeper has started the ranks"]),
    ]
    assert (recorded["step"], recorded["total_steps"], recorded["restored"]) == (
        manifest.step if manifest else 0,
        9,
        source,
    )
    assert recorded["data"] == {"train": "t", "eval": "e", "eval.sets.code": "c"}


@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_meets_the_others_resolves_and_claims_its_start_once(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config: Any = SimpleNamespace(run=SimpleNamespace(name="mine"))
    ranks = SimpleNamespace(
        rank=number, broadcast=lambda value: {"data": "data of rank 0"}.get(value, 7 if number else value)
    )
    started = list[Any]()

    @contextmanager
    def entered(start: Any) -> Iterator[Any]:
        started.append(start)
        yield start

    stands_in: dict[str, Any] = {
        "open_run_store": lambda _: SimpleNamespace(sub=lambda name: f"the folder of {name}"),
        "lost_ranks": lambda folder: f"lost in {folder}",
        "join_run": lambda config, is_gone: ranks if is_gone == "lost in the folder of mine" else None,
        "resolve_alike": lambda config, ranks: SimpleNamespace(config="resolved"),
        "copies_updates": lambda config: config == "resolved",
        "met": lambda ranks, kept, *, copies: ("met", kept, copies),
        "claim_generation": lambda folder: 5 if number == 0 else pytest.fail("one rank claims it"),
        "opened": entered,
        "early_end": lambda start: nullcontext(),
        "ClaimedStart": lambda *given: SimpleNamespace(given=given),
        "_assemble": lambda start, shared, *, resume: (shared, resume),
        "_train": lambda start, training, restored: started.append((training, restored)),
    }
    for name, value in stands_in.items():
        monkeypatch.setattr(rank, name, value)
    data: Any = "data"
    rank.run_rank(config, data, resume=True)
    claimed, trained = started
    assert claimed.given[4] == (7 if number else 5)
    assert claimed.given[5].kept == ("met", None, True)
    assert trained == ("data of rank 0", True)
