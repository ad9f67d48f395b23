"""When a save is due while another is under way, when saves fail, and when a removal does: it is counted, and training
goes on.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from launcher.view.status import read_generation
from tests.dist import faults, runs
from tests.dist.launch import launch
from tests.material import Workshop, make_data
from trainer.config import dump_config
from trainer.run import layout
from trainer.state.checkpoint.manifest import committed_steps, read_manifest


def kinds(result: dict[str, Any]) -> list[tuple[str, int]]:
    return [(event["kind"], event["step"]) for event in result["events"]]


def test_a_save_that_is_due_too_early_is_skipped_and_counted_but_not_one_that_must_be(tmp_path: Path) -> None:
    (result,) = launch(1, faults.saves_while_one_is_under_way, str(tmp_path), "skip")
    assert result["held"]
    assert kinds(result) == [("save_skipped", 2), ("commit", 1), ("commit", 3)]
    assert result["events"][0]["skipped"] == 1
    assert result["committed"] == [3, 1]


def test_a_save_that_is_due_too_early_waits_and_its_stall_is_told(tmp_path: Path) -> None:
    (result,) = launch(1, faults.saves_while_one_is_under_way, str(tmp_path), "wait")
    assert result["held"]
    assert kinds(result) == [("commit", 1), ("commit", 2), ("commit", 3)]
    stalls = [event["stall_seconds"] for event in result["events"]]
    assert stalls[1] > 0.1 > stalls[0]


@pytest.mark.parametrize(("allowed", "ends_at"), [(0, 1), (2, 6)])
def test_saves_may_fail_so_often_in_a_row_and_no_more(tmp_path: Path, allowed: int, ends_at: int) -> None:
    results = launch(2, faults.saves_on_a_failing_store, str(tmp_path), allowed)
    for result in results:
        assert result["ended"]["step"] == ends_at
        assert (result["ended"]["outcome"], result["ended"]["exit_code"]) == ("StorageError", 6)
        assert f"rank 0 could not save the checkpoint of step {ends_at}" in result["ended"]["message"]
        expected = [("commit" if step == 3 else "save_failed", step) for step in range(1, ends_at + 1)]
        assert kinds(result) == expected
        assert result["committed"] == ([3] if ends_at > 3 else [])


def test_a_removal_that_fails_is_told_and_the_save_is_good(tmp_path: Path) -> None:
    (events,) = launch(1, faults.a_removal_that_fails, str(tmp_path))
    assert events == ["commit", "prune_failed checkpoints/step-000000001/manifest.json is held."]


def test_the_best_by_evaluation_loss_outlives_newer_ones(tmp_path: Path) -> None:
    assert launch(1, faults.saves_with_losses, str(tmp_path), [0.9, 0.5, 0.7, None, 0.6]) == [[5, 2]]


def test_each_evaluation_is_committed_with_its_loss_when_the_best_are_kept(workshop: Workshop, tmp_path: Path) -> None:
    """The loss of the unnamed data decides, whatever named sets there are; a set of the same rows has the same loss."""
    rows, other = (
        make_data(tmp_path / "eval.jsonl", documents=8, seed=6),
        make_data(tmp_path / "other.jsonl", 6, seed=7),
    )
    config = workshop.config(
        "best",
        f"data.eval=[{{path: {rows}}}]",
        f"eval.sets={{same: {{path: {rows}}}, other: {{path: {other}}}}}",
        "train.steps=5",
        "eval.every=2",
        "checkpoint.every_steps=0",
        "checkpoint.keep_last=9",
        "checkpoint.keep_best=1",
    )
    datasets = workshop.prepare(config)
    assert datasets.sets["same"] == datasets.eval
    given = (dump_config(config), datasets.train, "start", datasets.eval, dict(datasets.sets))
    (outcome,) = launch(1, runs.run, *given)
    assert outcome["outcome"] == "finished", outcome
    run = workshop.store.sub("best")
    known = json.loads(run.get(layout.ENVIRONMENT))
    assert (known["world_size"], known["versions"]["torch"]) == (1, version("torch"))
    assert committed_steps(run) == [5, 4, 2, 1]
    losses: dict[str | None, dict[int, float]] = {None: {}, "same": {}, "other": {}}
    for record in read_generation(run, 1)["eval"]:
        losses[record.get("set")][record["step"]] = record["loss"]
    assert [list(found) for found in losses.values()] == [[0, 2, 4, 5]] * 3
    assert {step: read_manifest(run, step).eval_loss for step in (2, 4, 5)} == {
        step: loss for step, loss in losses[None].items() if step
    }
    assert read_manifest(run, 1).eval_loss is None
    assert losses["same"] == pytest.approx(losses[None], rel=1e-6)
    assert losses["other"] != pytest.approx(losses[None], rel=1e-2)


@pytest.mark.long
def test_what_comes_so_often_an_epoch_and_what_ends_a_run_hold_in_a_whole_run(
    workshop: Workshop, tmp_path: Path
) -> None:
    """30 rows are 8 steps, so twice in each epoch are steps 4, 8, 12 and 16; no evaluation is better at a rate of
    nothing.
    """
    rows, other = make_data(tmp_path / "train.jsonl", 30), make_data(tmp_path / "eval.jsonl", documents=8, seed=6)
    config = workshop.config(
        "rhythm",
        f"data.train=[{{path: {rows}}}]",
        f"data.eval=[{{path: {other}}}]",
        "data.packing=false",
        "train.steps=null",
        "train.epochs=2",
        "optim.lr=1e-30",
        "eval.per_epoch=2",
        "checkpoint.every_steps=0",
        "checkpoint.keep_last=9",
        "checkpoint.keep_best=1",
        "train.stop_when={no_better: 2}",
    )
    datasets, run = workshop.prepare(config), workshop.store.sub("rhythm")
    epochs = [[list(chapter) for chapter in epoch] for epoch in datasets.epochs]
    (outcome,) = launch(1, runs.run, dump_config(config), datasets.train, "start", datasets.eval, {}, epochs)
    assert outcome["outcome"] == "finished", outcome
    assert [record["step"] for record in read_generation(run, 1)["eval"]] == [0, 4, 8, 12]
    assert committed_steps(run) == [12, 8, 4, 1]
    (end,) = read_generation(run, 1)["end"]
    assert (end["outcome"], end["step"]) == ("finished", 12)
    assert end["reason"].startswith("2 evaluations in a row were no better than ")
