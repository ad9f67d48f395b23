"""The smoke run's verdict: every claim must have been measured and must hold."""

from dataclasses import replace

import pytest

from launcher.smoke.verdict import STEPS, Sight, SmokeResult
from trainer.export.figures import Proof

PROOF = Proof(
    kl=1e-9,
    kl_allowed=1e-8,
    kl_effect=0.1,
    log_prob=1e-5,
    log_prob_allowed=1e-4,
    log_prob_effect=0.3,
    computed_in="fp32",
    rows="8 rows of the training data",
)
GOOD = SmokeResult(
    steps=STEPS,
    loss_first=7.0,
    loss_last=6.5,
    killed_at_step=8,
    resumed_at_step=5,
    world_before=2,
    world_after=1,
    resume_loss_gap=0.0,
    proof=PROOF,
    checkpoints=4,
    device="cpu",
)


def test_ok_when_everything_was_measured_and_holds():
    assert GOOD.ok
    assert GOOD.to_json()["ok"] is True


@pytest.mark.parametrize(
    "change",
    [
        {"loss_last": 7.0},
        {"loss_last": None},
        {"resume_loss_gap": 0.002},
        {"resume_loss_gap": float("nan")},
        {"resume_loss_gap": None},
        {"proof": None},
        {"proof": replace(PROOF, kl=2e-8)},
        {"proof": replace(PROOF, kl=float("nan"))},
        {"proof": replace(PROOF, log_prob=2e-4)},
        {"proof": replace(PROOF, log_prob=float("nan"))},
        {"proof": replace(PROOF, kl_effect=1e-8)},
        {"killed_at_step": None},
        {"killed_at_step": STEPS},
        {"resumed_at_step": None},
        {"resumed_at_step": 0},
        {"world_after": 2},
        {"checkpoints": 1},
        {"steps": STEPS - 1},
        {"error": "a part was skipped"},
    ],
    ids=str,
)
def test_not_ok_when_one_claim_fails_or_was_not_measured(change):
    assert not replace(GOOD, **change).ok


def test_one_gpu_keeps_the_world_size_and_the_table_says_so():
    result = replace(GOOD, device="cuda:0", world_before=1, world_after=1)
    assert result.ok
    assert any("one GPU" in check.measured for check in result.checks)


def test_an_empty_result_is_not_ok():
    assert not SmokeResult().ok


SEES = replace(GOOD, images=True, sight=Sight(before=0.01, after=0.98, shuffled=0.47, pictures=200))


def test_a_run_over_pictures_is_ok_when_it_learned_to_see():
    assert SEES.ok
    assert [check.what for check in SEES.checks if "pictures" in check.what] == [
        "200 held-out pictures",
        "the same, pictures shuffled",
    ]


@pytest.mark.parametrize(
    "sight",
    [
        None,
        Sight(before=0.01, after=0.79, shuffled=0.47, pictures=200),
        Sight(before=0.85, after=0.98, shuffled=0.47, pictures=200),  # the run has taught it nothing
        Sight(before=0.01, after=0.98, shuffled=0.98, pictures=200),  # the pictures say nothing
        Sight(before=0.01, after=float("nan"), shuffled=0.47, pictures=200),
    ],
)
def test_a_run_over_pictures_is_not_ok_when_the_pictures_do_not_matter(sight: Sight | None):
    assert not replace(SEES, sight=sight).ok


def test_a_run_has_to_make_the_steps_that_it_was_asked_for():
    assert not replace(GOOD, asked=40).ok
    assert replace(GOOD, asked=40, steps=40).ok
