"""Each course of the learning rate is that of transformers or torch, step by step."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from transformers import optimization

from trainer.config import Optim, parse_config
from trainer.errors import ConfigError
from trainer.train.horizon import SCHEDULES, learning_rate

LR, STEPS = 0.02, 57
Made = Callable[[SGD, int], LambdaLR]

THEIRS: dict[str, tuple[dict[str, Any], Made]] = {
    "constant": ({}, lambda sgd, warm: optimization.get_constant_schedule_with_warmup(sgd, warm)),
    "linear": ({"min_lr_ratio": 0}, lambda sgd, warm: optimization.get_linear_schedule_with_warmup(sgd, warm, STEPS)),
    "cosine": (
        {"min_lr_ratio": 0.2},
        lambda sgd, warm: optimization.get_cosine_with_min_lr_schedule_with_warmup(sgd, warm, STEPS, min_lr_rate=0.2),
    ),
    "cosine_with_restarts": (
        {"min_lr_ratio": 0, "cycles": 3},
        lambda sgd, warm: optimization.get_cosine_with_hard_restarts_schedule_with_warmup(sgd, warm, STEPS, 3),
    ),
    "polynomial": (
        {"min_lr_ratio": 0.05, "power": 2.5},
        lambda sgd, warm: optimization.get_polynomial_decay_schedule_with_warmup(sgd, warm, STEPS, 0.05 * LR, 2.5),
    ),
    "inverse_sqrt": ({}, lambda sgd, warm: optimization.get_inverse_sqrt_schedule(sgd, warm)),
    "wsd": (
        {"min_lr_ratio": 0.1, "decay_ratio": 0.3},
        lambda sgd, warm: optimization.get_wsd_schedule(sgd, warm, 18, num_training_steps=STEPS, min_lr_ratio=0.1),
    ),
}


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("name", THEIRS)
def test_a_course_is_that_of_transformers(name: str, warmup: int) -> None:
    settings, make = THEIRS[name]
    theirs = make(SGD([torch.zeros(1)], LR), warmup).lr_lambdas[0]
    optim = Optim(lr=LR, schedule=name, warmup_steps=warmup, **settings)  # type: ignore[arg-type]
    first = warmup if name == "wsd" else 1  # whose rise begins at the last rate there
    for step in range(max(1, first), STEPS + 1):
        assert learning_rate(optim, step, STEPS) == pytest.approx(LR * theirs(step), rel=1e-9, abs=1e-12)


def test_the_rise_of_a_power_is_axolotls_quadratic_one() -> None:
    optim = Optim(lr=LR, warmup_steps=10, warmup_power=2)
    assert [learning_rate(optim, step, STEPS) for step in (1, 5, 10)] == pytest.approx([LR / 100, LR / 4, LR])
    with pytest.raises(ConfigError, match="optim.warmup_power: has no effect without warm-up"):
        parse_config(
            "optim: {warmup_power: 2}\nrun: {name: a}\nmodel: {base: b}\ndata: {train: [{path: c}]}\ntrain: {steps: 1}"
        )


@pytest.mark.parametrize(
    ("total", "rises"), [(9, [1.0, 1.0]), (10, [1.0, 1.0]), (11, [0.5, 1.0]), (21, [1 / 3, 2 / 3, 1.0, 1.0])]
)
def test_a_rise_over_a_share_of_the_steps_is_rounded_up_as_in_transformers(total: int, rises: list[float]) -> None:
    optim = Optim(lr=LR, warmup_ratio=0.1, schedule="constant")
    found = [learning_rate(optim, step, total) / LR for step in range(1, len(rises) + 1)]
    assert found == pytest.approx(rises)


def test_a_rise_may_begin_above_zero() -> None:
    optim = Optim(lr=LR, warmup_steps=10, warmup_from=0.1)
    assert [learning_rate(optim, step, STEPS) for step in (1, 5, 10)] == pytest.approx([0.19 * LR, 0.55 * LR, LR])
    with pytest.raises(ConfigError, match="optim.warmup_from: has no effect with optim.schedule: one_cycle"):
        parse_config(
            "optim: {warmup_from: 0.1, warmup_steps: 2, schedule: one_cycle}\nrun: {name: a}\nmodel: {base: b}\n"
            "data: {train: [{path: c}]}\ntrain: {steps: 1}"
        )


def test_one_cycle_is_that_of_torch() -> None:
    sgd = SGD([torch.zeros(1, requires_grad=True)], 1.0)
    # torch counts from 0, and its rise ends a step earlier than a share of the steps.
    theirs, rates = OneCycleLR(sgd, LR, total_steps=STEPS + 1, pct_start=(10 + 1) / (STEPS + 1)), list[float]()
    for _ in range(STEPS):
        sgd.step()
        theirs.step()
        rates.append(float(theirs.get_last_lr()[0]))
    ours = [
        learning_rate(Optim(lr=LR, schedule="one_cycle", warmup_steps=10), step, STEPS) for step in range(1, STEPS + 1)
    ]
    assert ours == pytest.approx(rates, rel=1e-9, abs=1e-12)


def test_every_name_has_a_course_and_refuses_what_it_does_not_read() -> None:
    assert set(get_args(Optim.model_fields["schedule"].annotation)) == set(SCHEDULES)
    text = "run: {name: a}\nmodel: {base: b}\ndata: {train: [{path: c}]}\ntrain: {steps: 9}\n"
    with pytest.raises(
        ConfigError, match=r"optim\.power: has no effect with optim\.schedule: cosine\. Remove it, or set"
    ):
        parse_config(text, ["optim.power=2"])
