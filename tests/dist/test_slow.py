"""A rank that computes longer than the others is named in the run's log and status, with its machine."""

from pathlib import Path

import pytest

from launcher.report.figures import read_figures
from launcher.view.status import read_status
from launcher.view.watch import read_log
from tests.dist import runs
from tests.dist.launch import launch
from tests.material import Workshop
from trainer.config import dump_config


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(Path(tmp_path_factory.mktemp("workshop")))


def test_a_rank_that_takes_several_times_as_long_is_named(workshop: Workshop) -> None:
    """It rests in its passes, in which the others wait in their collectives: their own time stays short."""
    config = workshop.config("slow", "train.steps=20")
    launch(2, runs.run, dump_config(config), workshop.prepare(config).train, "rests")
    run = workshop.store.sub("slow")
    (slow,) = read_status(run).slow_ranks
    assert slow.rank == 1
    assert slow.step <= 20
    assert slow.ratio is not None
    assert slow.ratio > 2
    sentence = f"rank 1 on {slow.machine} takes"
    assert sentence in read_log(run, 0)
    assert sentence in read_log(run, 1)
    assert any(sentence in note for note in read_figures(run).notes)


@pytest.mark.long
def test_a_run_that_replaces_slow_ranks_ends_after_the_next_commit(workshop: Workshop) -> None:
    config = workshop.config("replaced", "train.steps=40", "checkpoint.every_steps=7", "retry.slow_rank=replace")
    outcomes = launch(2, runs.run, dump_config(config), workshop.prepare(config).train, "rests")
    assert {outcome["outcome"] for outcome in outcomes} == {"SlowMachine"}
    assert {outcome["exit_code"] for outcome in outcomes} == {75}
    status = read_status(workshop.store.sub("replaced"))
    assert status.last_commit_step == status.step
    assert status.step in (14, 21)
    assert "is slower than the other machines, with a checkpoint committed" in status.reason
