"""Evaluations of one step add up in the run's folder, as long as they are of the same base."""

from pathlib import Path
from typing import Any

import pytest

from trainer.config import parse_config
from trainer.run import layout
from trainer.run.evaluations import keep_evaluation, other_settings, read_evaluation
from trainer.store.store import open_store


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
    for content in (b"{", b"[]", b'{"sets": []}', b'{"tasks": {"t": {"acc": 3}}}', b"\xff"):
        run.put(layout.evaluation(4), content)
        assert read_evaluation(run, 4) == {}
        keep_evaluation(run, found(sets={"a": {"loss": 1}}))
        assert read_evaluation(run, 4) == found(sets={"a": {"loss": 1}})


OWN = (
    "{run: {name: a, store: b}, model: {base: c}, data: {train: [{path: d}], held_out: 0.1}, eval: {sets: {general:"
    " {path: e}}}, train: {steps: 1}}"
)


@pytest.mark.parametrize(
    ("changes", "under"),
    [
        ([], []),
        (["eval.tasks=[arc_easy]", "eval.sets.more.path=f", "cluster.workers=2", "model.attention=sdpa"], []),
        (["data.thinking=strip"], ["data.thinking"]),
        (["data.sequence_length=77", "data.train_on={end: false}"], ["data.train_on", "data.sequence_length"]),
        (["data.held_out=0.2"], ["data.held_out"]),
        (["eval.sets.general.path=f"], ["eval.sets.general"]),
        (["eval.bias=pairs.csv"], []),
        (["eval.sets={}"], []),
    ],
)
def test_figures_under_other_settings_are_not_the_runs(changes: list[str], under: list[str]) -> None:
    assert other_settings(parse_config(OWN), parse_config(OWN, changes)) == under


def test_pairs_of_sentences_other_than_the_runs_are_not_its_own() -> None:
    own = parse_config(OWN, ["eval.bias=own.csv"])
    assert other_settings(own, parse_config(OWN, ["eval.bias=other.csv"])) == ["eval.bias"]


def test_a_run_without_evaluation_data_is_given_some() -> None:
    own = OWN.replace(", held_out: 0.1", "")
    assert other_settings(parse_config(own), parse_config(own, ["data.eval=[{path: f}]"])) == []
    assert other_settings(parse_config(own), parse_config(own, ["data.thinking=strip"])) == ["data.thinking"]
