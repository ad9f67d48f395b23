"""The loss over sampled answers is TRL's, in each of its forms."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trainer.config import parse_config
from trainer.errors import ConfigError
from trainer.model.head import IGNORE
from trainer.model.micro_batch import ColumnValues, MicroBatch, ModelInput, Role, Segments
from trainer.tuning.objective import find_objective, measured

LENGTHS = (3, 5, 1, 4)
CONFIG = """
run: {name: a}
model: {base: /models/small}
data: {train: [{path: a.jsonl}], format: prompt_completion}
train: {steps: 1}
objective: {name: grpo}
rollout: {reward: exact}
"""
DRAW = np.random.default_rng(4)
LOG_P, SAMPLED, BASE = (-DRAW.uniform(0.1, 2, sum(LENGTHS)) for _ in range(3))
REWARDS = np.array([[1.0, 0.0], [0.5, 0.25]])


def objective_of(*overrides: str) -> Any:
    return find_objective(parse_config(CONFIG, overrides))


def row(advantages: Any) -> MicroBatch:
    """Four answers behind prompts of two tokens, and three tokens of padding."""
    labels = list[int]()
    for length in LENGTHS:
        labels += [IGNORE, *range(1, length + 1), IGNORE]
    segments = Segments((*(length + 2 for length in LENGTHS), 3), (*[Role.DOCUMENT] * len(LENGTHS), Role.PADDING))
    labels += [IGNORE] * 3
    columns = np.stack([SAMPLED, np.repeat(advantages, LENGTHS)], axis=1)
    zeros = torch.zeros(1, len(labels), dtype=torch.int32)
    return MicroBatch(
        ModelInput.of(zeros, zeros, segments),
        labels=torch.tensor([labels]),
        tokens=len(labels) - 3,
        targets=sum(LENGTHS),
        documents=tuple(range(len(LENGTHS))),
        columns={"sampled": ColumnValues("target", torch.from_numpy(columns).float())},
    )


def model(*of_passes: Any) -> Any:
    """A model whose passes give these log-probabilities, one after the other."""
    passes = iter(of_passes)
    head = lambda hidden, labels, places, per_target: -next(passes)  # noqa: E731
    return SimpleNamespace(hidden=lambda batch: None, head=head, model=torch.nn.Identity())


def our_loss(*overrides: str) -> tuple[float, torch.Tensor]:
    objective = objective_of(*overrides)
    log_p = torch.tensor(LOG_P, dtype=torch.float32, requires_grad=True)
    passes = [torch.tensor(BASE, dtype=torch.float32)] if "objective.beta=0.3" in overrides else []
    batch = row(objective.advantages(REWARDS, None))
    sums = objective.loss(model(*passes, log_p), batch)
    loss = sums[0] / objective.weight(batch)
    return float(loss), torch.autograd.grad(loss, log_p)[0]


def their_loss(**settings: Any) -> tuple[float, torch.Tensor]:
    """By TRL's own function, over padded answers."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    def padded(values: Any) -> torch.Tensor:
        parts = torch.tensor(values, dtype=torch.float32).split(LENGTHS)
        return torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)

    given = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
    } | settings
    log_p = padded(LOG_P).requires_grad_()
    mask = padded(np.ones(sum(LENGTHS)))
    centred = REWARDS - REWARDS.mean(1, keepdims=True)
    spread = 1.0 if given["loss_type"] == "dr_grpo" else REWARDS.std(1, ddof=1, keepdims=True) + 1e-4
    inputs = {
        "prompt_ids": torch.zeros(4, 2), "prompt_mask": torch.ones(4, 2), "completion_ids": torch.zeros_like(mask), "completion_mask": mask,
        "advantages": torch.tensor((centred / spread).reshape(-1), dtype=torch.float32), "old_per_token_logps": padded(SAMPLED),
        "ref_per_token_logps": padded(BASE), "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    alone = SimpleNamespace(num_processes=1, gather=lambda value: value, reduce=lambda value, reduction: value)
    trainer: Any = SimpleNamespace(
        **given, aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1, max_completion_length=7, accelerator=alone, model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1), _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_p, torch.zeros_like(log_p), None),
    )  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    gradient = torch.autograd.grad(loss, log_p)[0]
    return float(loss), torch.cat([part[:length] for part, length in zip(gradient, LENGTHS, strict=True)])


FORMS = {
    "grpo": ((), {}),
    "kl": (("objective.beta=0.3",), {"beta": 0.3}),
    "dapo": (("objective.mean_over=tokens", "objective.clip_high=0.28"), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr_grpo": (("objective.mean_over=constant", "objective.longest_answer=7", "objective.advantage=centred"), {"loss_type": "dr_grpo"}),
    "gspo": (("objective.ratio_of=answer",), {"importance_sampling_level": "sequence"}),
    "cispo": (("objective.ratio=truncated", "objective.mean_over=tokens"), {"loss_type": "cispo", "epsilon_high": 1.2}),
}  # fmt: skip


# TRL's loss, the length of its gradient, and the sum of the gradient's values times their places from 1 on.
TRLS = {
    "grpo": (0.2608112, 0.3178144, 1.6998088),
    "kl": (0.4013966, 0.4548808, 0.1431792),
    "dapo": (0.6703867, 0.3689348, 4.3768058),
    "dr_grpo": (0.1802810, 0.1144812, 1.0430844),
    "gspo": (0.0868162, 0.2560261, -0.3447240),
    "cispo": (-0.1385702, 0.1924307, 3.0805864),
}


def figures_of(loss: float, gradient: torch.Tensor) -> tuple[float, float, float]:
    return loss, float(gradient.norm()), float(gradient @ torch.arange(1.0, 1 + len(gradient)))


@pytest.mark.long  # TRL's imports take seconds
@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_trls(form: str) -> None:
    ours, theirs = FORMS[form]
    (mine, my_gradient), (other, other_gradient) = our_loss(*ours), their_loss(**theirs)
    assert mine == pytest.approx(other, rel=1e-5)
    torch.testing.assert_close(my_gradient, other_gradient, rtol=1e-5, atol=1e-6)
    assert figures_of(other, other_gradient) == pytest.approx(TRLS[form], rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_what_trl_was_seen_to_compute(form: str) -> None:
    assert figures_of(*our_loss(*FORMS[form][0])) == pytest.approx(TRLS[form], rel=1e-5)


def test_the_base_gives_its_probabilities_without_what_learns() -> None:
    off, passes = list[bool](), [torch.tensor(values, dtype=torch.float32) for values in (BASE, LOG_P)]

    @contextmanager
    def switched_off(_model: Any) -> Iterator[None]:
        off.append(True)
        yield
        off.clear()

    asked = list[bool]()
    objective, twice = objective_of("objective.beta=0.3"), model()
    objective._method = SimpleNamespace(switched_off=switched_off)
    twice.head = lambda *_, **__: asked.append(bool(off)) or -passes.pop(0)
    objective.loss(twice, row(objective.advantages(REWARDS, None)))
    assert asked == [True, False]


def test_figures_are_means_over_tokens() -> None:
    objective = objective_of()
    batch = row(objective.advantages(REWARDS, None))
    sums = objective.loss(model(torch.tensor(LOG_P, dtype=torch.float32)), batch)
    figures = measured(objective, (sums[1:] / objective.weight(batch)).tolist())
    assert figures["entropy"] == pytest.approx(-SAMPLED.mean(), rel=1e-5)
    assert figures["log_ratio"] == pytest.approx(np.abs(LOG_P - SAMPLED).mean(), rel=1e-5)
    assert figures["kl"] == 0
    _, gradient = our_loss()
    assert figures["clipped"] == pytest.approx(float((gradient == 0).float().mean())), "the share without a gradient"
    assert 0 < figures["clipped"] < 1


def test_the_share_of_truncated_weights_is_that_of_ratios_above_the_bound() -> None:
    objective = objective_of("objective.ratio=truncated", "objective.clip_high=0.5")
    batch = row(objective.advantages(REWARDS, None))
    sums = objective.loss(model(torch.tensor(LOG_P, dtype=torch.float32)), batch)
    figures = measured(objective, (sums[1:] / objective.weight(batch)).tolist())
    assert figures["clipped"] == pytest.approx((np.exp(LOG_P - SAMPLED) > 1.5).mean())


def test_a_base_that_learns_leaves_nothing_to_compare_with_but_is_rewarded_all_the_same() -> None:
    full = ("tuning.method=full", "quant.type=none")
    assert objective_of(*full).mismatches() == []
    (sentence,) = objective_of(*full, "objective.beta=0.1").mismatches()
    assert sentence.startswith("objective.beta: there is no base to compare with")


def test_a_teacher_that_scores_answers_later_leaves_each_without_an_advantage_until_then() -> None:
    objective = objective_of("objective.name=opd", "objective.teacher=/models/large")
    assert objective.advantages(REWARDS, None) == [0.0] * 4
    gaps = [[0.5], [-0.25, 1.0], [0.0], [2.0]]
    assert objective.advantages(REWARDS, gaps) == gaps


def test_a_teacher_of_sampled_answers_leaves_the_form_of_the_loss_to_the_settings() -> None:
    opd = ("objective.name=opd", "objective.teacher=/models/large")
    form = ("ratio=clipped", "clip_low=0.1", "clip_high=0.3", "mean_over=constant", "longest_answer=7")
    assert objective_of(*opd, *(f"objective.{one}" for one in form)).mismatches() == []
    for given in ("ratio_of=answer", "advantage=centred", "beta=0.1"):
        with pytest.raises(
            ConfigError, match=f"objective.{given.partition('=')[0]}: has no effect with objective.name"
        ):
            objective_of(*opd, f"objective.{given}")


def test_an_evaluation_needs_no_rollouts() -> None:
    objective = objective_of()
    batch = row([0.0] * len(LENGTHS))
    sums = objective.loss(model(torch.tensor(LOG_P)), replace(batch, columns={}))
    assert float(sums[0]) == pytest.approx(-LOG_P.sum())
    assert len(sums) == 1 + objective.sums


@pytest.mark.parametrize(
    ("given", "refused", "sentence"),
    [
        ("objective.longest_answer=7", "objective.mean_over=tokens", "objective.longest_answer: has no effect with"),
        ("objective.clip_low=0.1", "objective.ratio=truncated", "objective.clip_low: has no effect with"),
    ],
)
def test_what_the_form_of_the_loss_does_not_read_is_refused(given: str, refused: str, sentence: str) -> None:
    (said,) = objective_of(given, refused).mismatches()
    assert said.startswith(sentence)
    read = {"objective.longest_answer=7": "objective.mean_over=constant"}.get(given, "objective.ratio=clipped")
    assert objective_of(given, read).mismatches() == objective_of(refused).mismatches() == []
