"""Losses of a pair of answers are the papers' formulas, and stay finite where an answer is certain."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import exp, log
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.config import parse_config
from trainer.tuning.objective import find_objective, measured, pairs
from trainer.tuning.objective.answers import Answers, sums_of_pairs

CONFIG = """
run: {name: a}
model: {base: /models/small}
data: {train: [{path: a.jsonl}], format: preference}
train: {steps: 1}
"""
# Log p of both answers, theirs by the reference, and the numbers of their tokens.
C, R, BASE_C, BASE_R, TOKENS_C, TOKENS_R = -3.0, -4.0, -3.5, -2.5, 2, 5
H = (C - BASE_C) - (R - BASE_R)


def s(x: float) -> float:
    return 1 / (1 + exp(-x))


def odds(mean: float) -> float:
    return exp(mean) / (1 - exp(mean))


DPO = 0.4 * (C - BASE_C), 0.4 * (R - BASE_R)
FORMULAS = {
    "name: dpo, beta: 0.4": (-log(s(0.4 * H)), *DPO),
    "name: dpo, beta: 0.4, label_smoothing: 0.2": (-0.8 * log(s(0.4 * H)) - 0.2 * log(s(-0.4 * H)), *DPO),
    "name: dpo, beta: 0.4, loss_type: hinge": (max(0, 1 - 0.4 * H), *DPO),
    "name: dpo, beta: 0.4, loss_type: ipo": ((H - 1 / 0.8) ** 2, *DPO),
    "name: dpo, beta: 0.4, loss_type: apo_zero": (1 - s(DPO[0]) + s(DPO[1]), *DPO),
    "name: dpo, beta: 0.4, loss_type: apo_down": (s(DPO[0]) + 1 - s(0.4 * H), *DPO),
    "name: dpo, beta: 0.4, sft_weight: 0.3": (-log(s(0.4 * H)) - 0.3 * C / TOKENS_C, *DPO),
    "name: orpo, beta: 0.7": (
        -C / TOKENS_C - 0.7 * log(s(log(odds(C / TOKENS_C) / odds(R / TOKENS_R)))),
        0.7 * C / TOKENS_C,
        0.7 * R / TOKENS_R,
    ),
    "name: simpo, beta: 1.7, gamma: 0.6": (
        -log(s(1.7 * (C / TOKENS_C - R / TOKENS_R) - 0.6)),
        1.7 * C / TOKENS_C,
        1.7 * R / TOKENS_R,
    ),
}


def judged(settings: str, chosen: torch.Tensor, rejected: torch.Tensor) -> Any:
    objective: Any = find_objective(parse_config(CONFIG, [f"objective={{{settings}}}"]))
    sides = Answers(chosen, torch.tensor([float(TOKENS_C)])), Answers(rejected, torch.tensor([float(TOKENS_R)]))
    reference = torch.tensor([[BASE_C], [BASE_R]]) if objective.reads_reference else None
    return objective.pair_loss.formula(objective.given, sides, reference)


@pytest.mark.parametrize("settings", FORMULAS)
def test_a_pairs_loss_and_rewards_are_the_papers(settings: str) -> None:
    found = judged(settings, torch.tensor([C]), torch.tensor([R]))
    figures = {"dpo": [((C - BASE_C) + (R - BASE_R)) / 2], "orpo": [-C / TOKENS_C], "simpo": []}
    assert [figure.item() for figure in found.more] == figures[settings.split(",")[0].removeprefix("name: ")]
    assert (found.losses.item(), *(reward.item() for reward in found.rewards)) == pytest.approx(FORMULAS[settings])


def test_an_answer_of_probability_1_has_finite_odds_and_gradients() -> None:
    sides = torch.zeros(1, requires_grad=True), torch.tensor([R], requires_grad=True)
    (loss,) = judged("name: orpo", *sides).losses
    assert torch.isfinite(torch.stack([loss, *(part[0] for part in torch.autograd.grad(loss, sides))])).all()


def test_a_pair_of_equal_rewards_is_in_no_order_and_the_first_rank_of_a_row_counts_it() -> None:
    losses = torch.tensor([0.5, 0.25, 1.0], requires_grad=True)
    chosen, rejected = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([0.0, 2.0, 3.0])

    def sums(first: int) -> Any:
        batch: Any = SimpleNamespace(input=SimpleNamespace(first=first))
        return sums_of_pairs(losses, chosen, rejected, [torch.tensor([1.0, 1.0, 2.0])], batch)

    assert sums(0).tolist() == [1.75, 3, 5, -2, 1, 4]
    assert sums(8).tolist() == [0] * 6
    assert torch.autograd.grad(sums(8)[0], losses)[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "stored", "passes"),
    [("dpo", False, ["base", "model"]), ("dpo", True, ["model"]), ("orpo", False, ["model"])],
)
def test_the_base_answers_only_where_its_answers_are_compared_with_and_not_stored(
    name: str, stored: bool, passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now, seen = ["model"], list[str]()

    @contextmanager
    def switched_off(model: Any) -> Iterator[None]:
        now[0] = "base"
        yield
        now[0] = "model"

    def read(model: Any, batch: Any) -> Any:
        seen.append(now[0])
        c, r = (BASE_C, BASE_R) if now[0] == "base" else (C, R)
        return Answers(torch.tensor([c]), torch.tensor([2.0])), Answers(torch.tensor([r]), torch.tensor([5.0]))

    monkeypatch.setattr(pairs, "read_answers", read)
    monkeypatch.setattr(pairs, "sums_of_pairs", lambda losses, *_: losses)
    objective: Any = find_objective(parse_config(CONFIG, [f"objective={{name: {name}, beta: 0.4}}"]))
    objective.method = SimpleNamespace(switched_off=switched_off)
    columns = {"reference": torch.tensor([[BASE_C, BASE_R]])} if stored else {}
    batch = SimpleNamespace(columns=columns, column=columns.get)
    losses = objective.loss(SimpleNamespace(model=None), batch)
    assert seen == passes
    if name == "dpo":
        assert losses.item() == pytest.approx(-log(s(0.4 * H)))


def test_the_figures_of_a_row_of_pairs_have_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [Answers(torch.tensor([p]), torch.tensor([float(n)])) for p, n in ((C, TOKENS_C), (R, TOKENS_R))]
    monkeypatch.setattr(pairs, "read_answers", lambda *_: answers)
    objective: Any = find_objective(parse_config(CONFIG, ["objective={name: dpo, beta: 0.4}"]))
    reference = {"reference": torch.tensor([[BASE_C, BASE_R]])}
    batch = SimpleNamespace(columns=reference, column=reference.get, input=SimpleNamespace(first=0))
    means = objective.loss(SimpleNamespace(model=None), batch)[1:].tolist()
    chosen, rejected = DPO
    assert measured(objective, means) == pytest.approx(
        {
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "reward_margin": chosen - rejected,
            "reward_accuracy": float(chosen > rejected),
            "length_chosen": TOKENS_C,
            "length_rejected": TOKENS_R,
            "log_ratio": ((C - BASE_C) + (R - BASE_R)) / 2,
        }
    )
