"""A run on data of several chapters trains while the later ones are still compiled."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from launcher.view.status import read_status
from tests.dist import runs
from tests.dist.launch import launch
from tests.material import Workshop, make_data
from tests.ray.cluster import Driver, losses, steps, write
from tests.ray.held_compilation import SMALL
from trainer.base.find.locate import resolve_base
from trainer.config import dump_config
from trainer.data.compile.prepare import prepare
from trainer.data.dataset.dataset import open_chapter
from trainer.data.order.order import EpochPlan
from trainer.data.order.settings import train_order
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.store import Store, open_store

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

STEPS = 16


class Ahead(NamedTuple):
    """A run on data that was compiled before it, and the steps that the first of its chapters is enough for."""

    data: Path
    run: Store
    enough: int


@pytest.fixture(scope="module")
def ahead(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ahead]:
    folder = tmp_path_factory.mktemp("ahead")
    data = make_data(folder / "rows.jsonl", documents=200)
    config = workshop.config("ahead", f"run.store={folder}", f"data.train=[{{path: {data}}}]", f"train.steps={STEPS}")
    store = open_store(config.run.store)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for setting in SMALL:
            monkeypatch.setattr(*setting)
        datasets = prepare(config, resolve_base(config.model), store)
        launch(2, runs.run, dump_config(config), datasets.train)
        first = open_chapter(store, datasets.train, 0)
        assert first.manifest.chapters > 2
        plan = EpochPlan(first.offsets, first.blocks, first.block_sources, train_order(config), epoch=0)
        enough = sum(plan.count_bins()) // config.train.global_batch
        assert 2 < enough < STEPS
        yield Ahead(data, store.sub("ahead"), enough)


def held(workshop: Workshop, folder: Path, data: Path, step: int, *settings: str, command: str = "train") -> Driver:
    """A run on data not yet compiled; after the first chapter the compilation waits until `step`."""
    store = folder / "store"
    settings = (*settings, f"run.store={store}", f"data.train=[{{path: {data}}}]", f"train.steps={STEPS}")
    what = [write(folder, workshop, "held", *settings)] if command == "train" else ["held", "--store", str(store)]
    arguments = (str(store / "held"), str(step), command, *what)
    return Driver(folder, *arguments, module="tests.ray.held_compilation")


def test_training_begins_with_the_first_chapter_and_goes_on_as_on_data_compiled_ahead(
    workshop: Workshop, address: str, tmp_path: Path, ahead: Ahead
):
    run = open_store(str(tmp_path / "store" / "held"))
    with held(workshop, tmp_path, ahead.data, ahead.enough, f"cluster.ray.address={address}") as driver:
        assert driver.end() == 0, driver.log.read_text()
    assert "chapter 2 of the training data is compiled" in driver.log.read_text()
    assert losses(run, 1) == losses(ahead.run, 1)
    assert [step["samples"] for step in steps(run, 1).values()] == [
        step["samples"] for step in steps(ahead.run, 1).values()
    ]


# The driver does the same with a cluster and without one, which starts in a third of the time.
def test_a_run_that_waits_for_a_chapter_stops_with_a_commit_and_goes_on(
    workshop: Workshop, tmp_path: Path, ahead: Ahead
):
    run = open_store(str(tmp_path / "store" / "held"))
    with held(workshop, tmp_path, ahead.data, step=STEPS) as driver:
        driver.wait_until(run, 1, lambda _: ahead.enough in steps(run, 1), f"step {ahead.enough}")
        driver.signal(signal.SIGTERM)
        assert driver.end() == 75, driver.log.read_text()
    assert committed_steps(run)[0] == max(steps(run, 1)) == ahead.enough
    assert read_status(run).state == "stopped"
    with held(workshop, tmp_path, ahead.data, step=ahead.enough, command="resume") as driver:
        assert driver.end() == 0, driver.log.read_text()
    assert losses(run, 1, 2) == losses(ahead.run, 1)


def test_a_bad_row_in_a_later_chapter_ends_the_run_with_its_sentence_and_a_commit(
    workshop: Workshop, tmp_path: Path, ahead: Ahead
):
    lines = ahead.data.read_text().splitlines()
    lines[150] = json.dumps({"prompt": "the ant"})
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines))
    run = open_store(str(tmp_path / "store" / "held"))
    with held(workshop, tmp_path, data, step=ahead.enough) as driver:
        assert driver.end() == 3, driver.log.read_text()
    assert "rows.jsonl:151: no field 'completion'" in driver.last_line("capstan: ")
    assert committed_steps(run)[0] == max(steps(run, 1)) >= ahead.enough
    status = read_status(run)
    assert status.state == "failed"
    assert "rows.jsonl:151: no field 'completion'" in status.reason
    assert not run.exists("STOP")
