"""A rank ends soon after another one of its machine was killed, and never for want of knowledge."""

import os
import subprocess
from collections.abc import Mapping

import pytest

from trainer.processes.children import Siblings

GROUP = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_TASKS_PER_NODE": "2", "SLURM_STEP_NUM_TASKS": "2"}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("given", [{**GROUP, "RANK": "1"}, {**SLURM, "SLURM_PROCID": "1"}])
def test_a_rank_that_was_killed_is_gone_after_seconds(given: Mapping[str, str]) -> None:
    clock, own = Clock(), {name: "0" if name in ("RANK", "SLURM_PROCID") else value for name, value in given.items()}
    siblings = Siblings(given, clock)
    with subprocess.Popen(["sleep", "60"], env={**os.environ, **own}) as first:
        clock.now = 100.0
        assert not siblings.is_gone(0)
        first.kill()
    clock.now = 104.0
    assert not siblings.is_gone(0)
    clock.now = 106.0
    assert siblings.is_gone(0)


def test_a_sibling_is_known_by_all_that_its_group_or_its_step_has_in_common() -> None:
    """Another step of the same job, or another group of this machine, has a rank of the same number."""
    asked = list[set[bytes]]()
    for given in ({**GROUP, "RANK": "1"}, {**SLURM, "SLURM_PROCID": "1"}):
        assert not Siblings(given, Clock(), lambda *marks: asked.append(set(marks)) or [1]).is_gone(0)
    assert asked == [
        {b"RANK=0", b"MASTER_ADDR=127.0.0.1", b"MASTER_PORT=29999"},
        {b"SLURM_PROCID=0", b"SLURM_JOB_ID=7", b"SLURM_STEP_ID=0"},
    ]


def test_a_rank_that_never_came_is_gone_after_half_a_minute() -> None:
    clock = Clock()
    siblings = Siblings({**GROUP, "RANK": "1"}, clock, lambda *marks: [])
    clock.now = 29.0
    assert not siblings.is_gone(0)
    clock.now = 31.0
    assert siblings.is_gone(0)


@pytest.mark.parametrize(
    "given",
    [
        {},  # of Ray, or alone
        {**GROUP, "RANK": "1", "LOCAL_WORLD_SIZE": "1"},  # on several machines
        {**GROUP, "RANK": "1", "TORCHELASTIC_RUN_ID": "none"},
        {**SLURM, "SLURM_PROCID": "1", "SLURM_TASKS_PER_NODE": "1(x2)"},
        *({**{key: value for key, value in GROUP.items() if key != lost}, "RANK": "1"} for lost in GROUP),
    ],
)
def test_of_ranks_that_may_be_elsewhere_nothing_is_known(given: Mapping[str, str]) -> None:
    clock = Clock()
    siblings = Siblings(given, clock, lambda *marks: [])
    clock.now = 1e6
    assert not siblings.is_gone(0)
