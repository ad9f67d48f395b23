"""Evaluations of one step add up in the run's folder, as long as they are of the same base."""

from pathlib import Path
from typing import Any

from trainer.run import layout
from trainer.run.evaluations import keep_evaluation, read_evaluation
from trainer.store import open_store


def found(base: str = "one", **parts: Any) -> dict[str, Any]:
    return {"step": 4, "base": {"name": base}, "sets": {}, "tasks": {}, "bias": {}, **parts}


def test_an_evaluation_keeps_what_an_earlier_one_measured(tmp_path: Path) -> None:
    run = open_store(str(tmp_path))
    assert read_evaluation(run, 4) == {}
    keep_evaluation(run, found(sets={"a": {"loss": 1}, "b": {"loss": 2}}))
    keep_evaluation(run, found(tasks={"t": {"acc": {"after": 3}}}))
    keep_evaluation(run, found(sets={"b": {"loss": 5}}))
    assert read_evaluation(run, 4) == found(
        sets={"a": {"loss": 1}, "b": {"loss": 5}}, tasks={"t": {"acc": {"after": 3}}}
    )
    keep_evaluation(run, found("another", bias={"g": {"mean": 6}}))
    assert read_evaluation(run, 4) == found("another", bias={"g": {"mean": 6}})


def test_a_damaged_evaluation_is_none_and_the_next_takes_its_place(tmp_path: Path) -> None:
    run = open_store(str(tmp_path))
    for content in (b"{", b"[]", b'{"sets": []}', b"\xff"):
        run.put(layout.evaluation(4), content)
        assert read_evaluation(run, 4) == {}
        keep_evaluation(run, found(sets={"a": {"loss": 1}}))
        assert read_evaluation(run, 4) == found(sets={"a": {"loss": 1}})
