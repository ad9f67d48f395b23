"""A command that is killed leaves no process behind, whatever it was doing; `python -m tests.kills` does it at
random.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub import serve_hub
from tests.kills import LATEST, Killed, RandomKills

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

# One of each way in which processes are started; the others are kinds of the same.
NAMES = ("build", "train on 2 ranks", "torchrun", "evaluate on 2 ranks", "export", "push", "sweep")
AT_RANDOM = ("build", "evaluate", "generate", "gguf", "sweep")
SEED, KILLS = 2027, 3


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    with serve_hub() as hub:
        yield Killed(tmp_path_factory.mktemp("killed"), hub)


@pytest.mark.parametrize("name", NAMES)
def test_five_seconds_after_a_kill_nothing_is_left(killed: Killed, name: str) -> None:
    latest, task = LATEST.get(name, 30.0), killed.task(name)
    left, _ = killed.left_by(task, 0.15 * latest)
    assert not left, "killed while it started"
    task = killed.task(name)
    trains = task.run is not None and name != "sweep"  # whose run is its second, which comes late
    left, was_at_work = killed.left_by(task, 300.0 if trains else 0.6 * latest, lambda: trains and task.steps() > 0)
    assert not left, "killed in the middle"
    assert was_at_work or not trains


def test_nothing_is_left_of_a_push_that_is_killed_in_the_middle_of_an_upload(killed: Killed) -> None:
    killed.hub.hold_after = 0
    assert killed.left_by(killed.task("push"), 300.0, killed.hub.holding.is_set) == ({}, True)
    assert killed.hub.holding.is_set()
    killed.hub.released.set()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", AT_RANDOM)
def test_killed_at_random_it_leaves_nothing_and_does_its_work_when_it_is_given_again(tmp_path: Path, name: str) -> None:
    """Rollouts are killed in tests/dist/test_rollouts.py."""
    kills = RandomKills(Killed(tmp_path, steps=30), SEED + AT_RANDOM.index(name))
    came = [kills.kill(name) for _ in range(KILLS)]
    assert all(well for _, well in came), "\n".join(said for said, _ in came)
