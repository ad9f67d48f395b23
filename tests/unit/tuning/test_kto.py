"""KTO's loss of an answer is the paper's, on either side of a mean ratio of 0."""

from math import exp
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.config import parse_config
from trainer.tuning.objective import find_objective, kto, measured
from trainer.tuning.objective.answers import Answers

CONFIG = """
run: {name: a}
model: {base: /models/small}
data: {train: [{path: a.jsonl}], format: labelled}
train: {steps: 1}
objective: {name: kto, beta: 0.5, desirable_weight: 1.5, undesirable_weight: 0.75}
"""
LOG_P, BASE = [-5.0, -7.0, -9.0, -4.0, -8.0], [-6.0, -6.5, -10.5, -4.5, -6.5]
DESIRED = [True, False, True, True, False]


@pytest.mark.parametrize(("ratios", "z0"), [((0.9, 0.3), 0.6), ((-0.9, 0.3), 0.0), ((), 0.0)])
def test_the_loss_is_the_papers_formula(ratios: tuple[float, ...], z0: float, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = find_objective(parse_config(CONFIG))
    answers = Answers(torch.tensor(LOG_P), torch.tensor([3.0, 4.0, 5.0, 7.0, 10.0]))
    monkeypatch.setattr(kto, "read_segments", lambda model, batch: answers)
    batch: Any = SimpleNamespace(
        survey=torch.tensor([sum(ratios), len(ratios), 3, 2, *BASE]),
        part=lambda role: None,
        column=lambda name: torch.tensor(DESIRED),
        input=SimpleNamespace(first=0),
    )
    sums = objective.loss(SimpleNamespace(), batch)  # type: ignore[arg-type]
    rewards = [0.5 * (log_p - base) for log_p, base in zip(LOG_P, BASE, strict=True)]
    expected = sum(
        1.5 * (1 - 1 / (1 + exp(0.5 * z0 - reward))) if desired else 0.75 * (1 - 1 / (1 + exp(reward - 0.5 * z0)))
        for reward, desired in zip(rewards, DESIRED, strict=True)
    )
    assert float(sums[0]) == pytest.approx(expected)
    assert measured(objective, (sums[1:] / 5).tolist()) == pytest.approx(
        {
            "reward_desired": (0.5 + 0.75 + 0.25) / 3,
            "reward_undesired": (-0.25 - 0.75) / 2,
            "reward_margin": 0.5 + 0.5,
            "kl": z0,
            "log_ratio": (1 - 0.5 + 1.5 + 0.5 - 1.5) / 5,
            "length_desired": 5,
            "length_undesired": 7,
        }
    )
