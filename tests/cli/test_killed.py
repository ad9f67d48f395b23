"""A command that is killed leaves no process behind, whatever it was doing; `python -m tests.kills` does it at random."""

from collections.abc import Iterator

import pytest

from tests.hub import serve_hub
from tests.kills import LATEST, Killed

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

# One of each way in which processes are started; the others are kinds of the same.
NAMES = ("build", "train on 2 ranks", "torchrun", "evaluate on 2 ranks", "export", "push", "sweep")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Killed]:
    with serve_hub() as hub:
        yield Killed(tmp_path_factory.mktemp("killed"), hub)


@pytest.mark.parametrize("name", NAMES)
def test_five_seconds_after_a_kill_nothing_is_left(killed: Killed, name: str) -> None:
    for share in (0.15, 0.6):
        after = share * LATEST.get(name, 30.0)
        left, _ = killed.left_by(killed.task(name), after)
        assert not left, f"killed after {after:.1f} s"


def test_nothing_is_left_of_a_push_that_is_killed_in_the_middle_of_an_upload(killed: Killed) -> None:
    killed.hub.hold_after = 0
    assert killed.left_by(killed.task("push"), 300.0, killed.hub.holding.is_set) == ({}, True)
    assert killed.hub.holding.is_set()
    killed.hub.released.set()
