"""The learning rate of every update, from the step alone."""

import pytest

from trainer.config import Optim
from trainer.train.schedule import learning_rate


def rates(total: int, **settings: object) -> list[float]:
    optim = Optim.model_validate({"lr": 1.0, "warmup_steps": 4, "min_lr_ratio": 0.2, **settings})
    return [learning_rate(optim, step, total) for step in range(1, total + 1)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak_at_its_last_step(schedule: str) -> None:
    assert rates(12, schedule=schedule)[:4] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_passes_the_middle_half_way_and_ends_at_the_minimum() -> None:
    course = rates(12, schedule="cosine")
    assert course[7] == pytest.approx(0.6)  # step 8: half of the eight steps after warm-up
    assert course[5] == pytest.approx(0.2 + 0.8 * (1 + 2**-0.5) / 2)
    assert course[-1] == pytest.approx(0.2)
    assert course[4:] == sorted(course[4:], reverse=True)


def test_linear_falls_by_the_same_amount_each_step() -> None:
    course = rates(12, schedule="linear")
    assert course[4:] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2])


def test_constant_stays_at_the_peak() -> None:
    assert rates(12, schedule="constant")[4:] == [1.0] * 8


def test_without_warm_up_the_first_update_is_close_to_the_peak() -> None:
    assert rates(100, schedule="cosine", warmup_steps=0)[0] == pytest.approx(1.0, abs=1e-3)


def test_a_ratio_is_that_share_of_all_steps_rounded_up() -> None:
    assert rates(12, warmup_steps=0, warmup_ratio=0.3) == rates(12, warmup_steps=4)
    assert rates(12, warmup_steps=0, warmup_ratio=0.4) != rates(12, warmup_steps=4)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_run_shorter_than_its_warm_up_still_has_a_rate(schedule: str) -> None:
    assert rates(2, schedule=schedule) == [0.25, 0.5]
    assert rates(4, schedule=schedule)[-1] == 1.0
