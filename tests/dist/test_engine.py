"""The names that trainer/state/zero/engine.py and trainer/base/load/load.py take from inside DeepSpeed still mean what
they are used for.
"""

import math
from typing import Any

import pytest

from tests.dist import engine
from tests.dist.assembled import LIMIT
from tests.dist.launch import launch
from tests.material import Workshop
from trainer.config import dump_config


@pytest.fixture(scope="module")
def internals(workshop: Workshop) -> list[dict[str, Any]]:
    """The internals of three ranks, after one step; LoRA rank 7 makes partitions of unequal length."""
    config = workshop.config("engine", "tuning.rank=7")
    return launch(3, engine.engine_internals, dump_config(config), workshop.prepare(config).train)


def test_partitions_are_the_masters_and_moments_that_deepspeed_shows(internals: list[dict[str, Any]]) -> None:
    for rank in internals:
        assert rank["wrong"] == []
        assert rank["left_over"] == []


def test_the_ranks_intervals_tile_every_trainable_parameter_without_padding(internals: list[dict[str, Any]]) -> None:
    names = internals[0]["intervals"]
    assert len(names) == 2 * 7 * 2
    uneven = 0
    for name in names:
        intervals = [rank["intervals"][name] for rank in internals]
        numel = math.prod(intervals[0][2:])
        borders = [0]
        for begin, end, *_ in intervals:
            assert begin == borders[-1]
            borders.append(end)
        assert borders[-1] == numel
        uneven += numel % 3 != 0
    assert uneven > 0, "every parameter divides by three, so no padding was tested"


def test_the_count_of_updates_is_adamws(internals: list[dict[str, Any]]) -> None:
    assert [rank["updates"] for rank in internals] == [1, 1, 1]


def test_every_rank_gets_the_same_gradient_norm(internals: list[dict[str, Any]]) -> None:
    assert len({rank["grad_norm"] for rank in internals}) == 1


def test_every_process_group_has_our_time_limit(internals: list[dict[str, Any]]) -> None:
    for rank in internals:
        assert len(rank["time_limits"]) > 1  # DeepSpeed has made one of its own
        assert set(rank["time_limits"]) == {LIMIT.total_seconds()}


def test_deepspeed_takes_the_device_that_the_rank_has(internals: list[dict[str, Any]]) -> None:
    assert [rank["devices"] for rank in internals] == [[0, "cuda:0", str(number)] for number in range(3)]


def test_a_step_says_how_long_it_waited_for_weights_beside_what_it_computed(internals: list[dict[str, Any]]) -> None:
    for rank in internals:
        seconds = rank["seconds"]
        step = seconds.pop("seconds")
        assert 0 < seconds.pop("look_seconds") < step / 2  # within the others
        assert min(seconds[f"{phase}_seconds"] for phase in ("gather", "forward", "backward", "optimizer")) > 0
        assert sum(seconds.values()) == pytest.approx(step, rel=0.03)


def test_an_update_parts_and_gathers_nothing_that_is_frozen(internals: list[dict[str, Any]]) -> None:
    for rank in internals:
        assert rank["parted"] == []
        assert rank["persistent"] > 5  # norms, and adapters that are small


def test_a_start_compiles_nothing(internals: list[dict[str, Any]]) -> None:
    assert [rank["compiled"] for rank in internals] == [False] * 3


def test_between_steps_no_rank_holds_more_of_a_frozen_parameter_than_its_share(
    internals: list[dict[str, Any]],
) -> None:
    for rank in internals:
        assert rank["whole_after_step"] == []
        assert rank["partitioned"] >= 2 * 7  # the packed weights at least
        assert rank["held"] < rank["numel"] / 3 * 1.01 + 10
        assert rank["persistent"] > 0  # some stay whole, so that refreshing those is tested too
