"""Two ranks of this machine, which their driver starts and watches itself."""

import os
import signal
from pathlib import Path

import pytest

from launcher.view.status import read_generation, read_status
from tests.dist import runs
from tests.dist.launch import launch
from tests.material import Workshop
from tests.ray.cluster import Driver, alive, losses, write
from trainer.config import dump_config
from trainer.store.store import open_store

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


def test_a_rank_that_is_killed_is_started_again_with_the_others(tmp_path: Path):
    workshop = Workshop(tmp_path)
    settings = "train.steps=40", "retry.failures=1"
    run = open_store(str(tmp_path / "store")).sub("killed")
    with Driver(tmp_path, "train", write(tmp_path, workshop, "killed", *settings)) as driver:
        pids = driver.wait_for(run, 1, step=6)["start"][0]["pids"]
        os.kill(pids[1], signal.SIGKILL)
        assert driver.end() == 0, driver.log.read_text()
    log = driver.log.read_text()
    assert log.count("launch: starts the processes of 2 ranks") == 2
    assert "rank 1 died: its process was killed by signal 9. Starting again from the last commit" in log
    assert (read_status(run).state, len(pids)) == ("finished", 2)
    assert not any(map(alive, [*pids, *read_generation(run, 2)["start"][0]["pids"]]))

    undisturbed = workshop.config("undisturbed", *settings, "checkpoint.every_steps=5")
    launch(2, runs.run, dump_config(undisturbed), workshop.prepare(undisturbed).train)
    assert losses(run, 1, 2) == losses(workshop.store.sub("undisturbed"), 1)
