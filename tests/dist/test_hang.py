"""A rank that hangs is named, every rank that can leaves its stack, and all of them end."""

import time
from pathlib import Path

import pytest

from launcher.view.status import read_status
from launcher.view.watch import read_log
from tests.dist import runs
from tests.dist.launch import RankFailed, running
from tests.material import Workshop
from trainer.config import dump_config


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(Path(tmp_path_factory.mktemp("workshop")))


@pytest.mark.parametrize(
    ("how", "named", "speaker"),
    [
        ("stuck", "rank 1 hangs in step of step 3: no progress", 0),
        pytest.param("stuck_inside", "rank 1 hangs in step of step 3: no progress", 0, marks=pytest.mark.long),
        pytest.param("freeze", "rank 0 hangs: no answer", 1, marks=pytest.mark.long),
    ],
)
def test_a_rank_that_hangs_is_named_and_the_others_end(workshop: Workshop, how: str, named: str, speaker: int) -> None:
    config = workshop.config(how, "timeouts.step=6", "timeouts.load=60")
    run = workshop.store.sub(how)
    with running(2, runs.run, dump_config(config), workshop.prepare(config).train, how) as group:
        with pytest.raises(RankFailed, match="ended with exit code 1"):
            group.wait()
        deadline = time.monotonic() + 60
        while read_status(run).state == "running" and time.monotonic() < deadline:
            time.sleep(0.1)  # the rank that says why may end after the other
    status = read_status(run)
    assert status.state == "failed"
    assert status.reason.startswith(named)
    assert "timeouts.step" in status.reason
    log = read_log(run, speaker)
    assert named in log
    assert "File" in log.partition("Python stacks")[2]
