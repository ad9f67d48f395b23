"""A run on data of several chapters trains while the later ones are still compiled."""

import json
import signal
from pathlib import Path

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
from trainer.state.checkpoint.listing import committed_steps
from trainer.store.store import Store, open_store

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

STEPS = 16


@pytest.fixture(autouse=True)
def chapters(monkeypatch: pytest.MonkeyPatch) -> None:
    for setting in SMALL:
        monkeypatch.setattr(*setting)


def ahead(workshop: Workshop, folder: Path, data: Path) -> tuple[Store, int]:
    """The run on data that was compiled before; and the steps that its first chapter is enough for."""
    config = workshop.config(
        "ahead", f"run.store={folder / 'ahead'}", f"data.train=[{{path: {data}}}]", f"train.steps={STEPS}"
    )
    store = open_store(config.run.store)
    datasets = prepare(config, resolve_base(config.model), store)
    launch(2, runs.run, dump_config(config), datasets.train)
    first = open_chapter(store, datasets.train, 0)
    assert first.manifest.chapters > 2
    plan = EpochPlan(first.offsets, first.blocks, first.block_sources, train_order(config), epoch=0)
    return store.sub("ahead"), sum(plan.count_bins()) // config.train.global_batch


def held(workshop: Workshop, address: str, folder: Path, data: Path, step: int, command: str = "train") -> Driver:
    """A run on data not yet compiled; after the first chapter the compilation waits until `step`."""
    settings = (
        f"cluster.ray.address={address}",
        f"run.store={folder / 'store'}",
        f"data.train=[{{path: {data}}}]",
        f"train.steps={STEPS}",
    )
    config = write(folder, workshop, "held", *settings)
    what = [config] if command == "train" else ["held", "--store", str(folder / "store")]
    arguments = (str(folder / "store" / "held"), str(step), command, *what)
    here = {"PYTHONPATH": str(Path(__file__).parents[2])}
    return Driver(folder, *arguments, environment=here, module="tests.ray.held_compilation")


def test_training_begins_with_the_first_chapter_and_goes_on_as_on_data_compiled_ahead(
    workshop: Workshop, address: str, tmp_path: Path
):
    data = make_data(tmp_path / "rows.jsonl", documents=200)
    expected, enough = ahead(workshop, tmp_path, data)
    assert 2 < enough < STEPS
    run = open_store(str(tmp_path / "store" / "held"))
    with held(workshop, address, tmp_path, data, step=enough) as driver:
        assert driver.end() == 0, driver.log.read_text()
    assert "chapter 2 of the training data is compiled" in driver.log.read_text()
    assert losses(run, 1) == losses(expected, 1)
    assert [step["samples"] for step in steps(run, 1).values()] == [
        step["samples"] for step in steps(expected, 1).values()
    ]


def test_a_run_that_waits_for_a_chapter_stops_with_a_commit_and_goes_on(
    workshop: Workshop, address: str, tmp_path: Path
):
    data = make_data(tmp_path / "rows.jsonl", documents=200)
    expected, enough = ahead(workshop, tmp_path, data)
    run = open_store(str(tmp_path / "store" / "held"))
    with held(workshop, address, tmp_path, data, step=STEPS) as driver:
        driver.wait_until(run, 1, lambda _: enough in steps(run, 1), f"step {enough}")
        driver.signal(signal.SIGTERM)
        assert driver.end() == 75, driver.log.read_text()
    assert committed_steps(run)[0] == max(steps(run, 1)) == enough
    assert read_status(run).state == "stopped"
    with held(workshop, address, tmp_path, data, step=enough, command="resume") as driver:
        assert driver.end() == 0, driver.log.read_text()
    assert losses(run, 1, 2) == losses(expected, 1)


def test_a_bad_row_in_a_later_chapter_ends_the_run_with_its_sentence_and_a_commit(
    workshop: Workshop, address: str, tmp_path: Path
):
    data = make_data(tmp_path / "rows.jsonl", documents=200)
    _, enough = ahead(workshop, tmp_path, data)
    lines = data.read_text().splitlines()
    lines[150] = json.dumps({"prompt": "the ant"})
    data.write_text("\n".join(lines))
    run = open_store(str(tmp_path / "store" / "held"))
    with held(workshop, address, tmp_path, data, step=enough) as driver:
        assert driver.end() == 3, driver.log.read_text()
    assert "rows.jsonl:151: no field 'completion'" in driver.last_line("capstan: ")
    assert committed_steps(run)[0] == max(steps(run, 1)) >= enough
    status = read_status(run)
    assert status.state == "failed"
    assert "rows.jsonl:151: no field 'completion'" in status.reason
    assert not run.exists("STOP")
