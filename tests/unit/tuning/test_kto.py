"""KTO's loss of an answer is the paper's, on either side of a mean ratio of 0."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import exp
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from trainer.config import parse_config
from trainer.model.micro_batch import ColumnValues, MicroBatch, ModelInput, Role, Segments
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


# Of three answers the second has no mismatched one. By the reference, and by the model for the mismatched ones:
ROLES = (Role.DOCUMENT, Role.MISMATCHED, Role.DOCUMENT, Role.DOCUMENT, Role.MISMATCHED)
OF_REFERENCE, OF_MISMATCHED = [-6.0, -3.0, -5.0, -7.0, -2.0], [-2.5, -4.0]
REFERENCE = [[-6.0, -3.0], [-5.0, 0.0], [-7.0, -2.0]]


@pytest.mark.parametrize("stored", [False, True])
def test_the_survey_has_the_mean_ratio_of_mismatched_answers_and_the_reference_of_the_others(
    stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    off, passes = [False], list[tuple[int, bool]]()

    @contextmanager
    def switched_off(model: Any) -> Iterator[None]:
        off[0] = True
        yield
        off[0] = False

    def read(model: Any, batch: MicroBatch) -> Answers:
        passes.append((len(batch.lengths), off[0]))
        log_p = torch.tensor(OF_REFERENCE if off[0] else OF_MISMATCHED)
        return Answers(log_p, torch.ones_like(log_p))

    monkeypatch.setattr(kto, "read_segments", read)
    objective = kto.Kto(parse_config(CONFIG).objective, cast(Any, SimpleNamespace(switched_off=switched_off)))
    columns = {"desired": ColumnValues("document", torch.tensor([True, False, True]))}
    if stored:
        columns["reference"] = ColumnValues("document", torch.tensor(REFERENCE))
    ids = torch.arange(10)[None]
    row = MicroBatch(ModelInput.of(ids, ids, Segments((2,) * 5, ROLES)), ids, 10, 10, columns=columns)
    assert objective.survey is not None
    survey = objective.survey.look(cast(Any, SimpleNamespace(model=None)), row)
    assert survey.tolist() == [(-2.5 + 3) + (-4 + 2), 2, 2, 1, -6, -5, -7]
    assert passes == ([] if stored else [(5, True)]) + [(2, False)]
    second = objective.survey.look(cast(Any, SimpleNamespace(model=None)), row.cut(1, 2))
    assert second.tolist() == [0, 0, 0, 0, -6, -5, -7], "the first of the ranks that share a row counts its answers"
