"""The smoke run's verdict: every claim must have been measured and must hold."""

from dataclasses import replace

import pytest

from launcher.smoke.verdict import LEAST_RIGHT, MOST_BY_CHANCE, STEPS, Sight, SmokeResult, table
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
        {"checkpoints": None},
        {"resumed_at_step": None},
        {"resumed_at_step": 0},
        {"world_after": 2},
        {"world_after": 3},
        {"world_before": 1},
        {"world_before": 1, "device": None},
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


def test_a_claim_holds_up_to_its_bound():
    bounds = {"resume_loss_gap": 1e-3, "checkpoints": 2, "killed_at_step": STEPS - 1, "proof": replace(PROOF, kl=1e-8)}
    assert replace(GOOD, **bounds).ok
    sight = Sight(before=LEAST_RIGHT - 0.01, after=LEAST_RIGHT, shuffled=MOST_BY_CHANCE, pictures=200)
    assert replace(SEES, sight=sight).ok


def test_a_run_that_samples_its_answers_is_judged_by_how_many_steps_have_them():
    sampled = replace(GOOD, loss_first=None, loss_last=None, chapters=STEPS, reward_first=0.125, reward_last=0.5)
    assert sampled.ok
    assert sampled.checks[0] == (
        "answers sampled",
        f"of {STEPS} steps, their reward 0.125 -> 0.5",
        f"of each of {STEPS} once",
        True,
    )
    assert not replace(sampled, chapters=STEPS - 1).ok
    assert not replace(sampled, chapters=STEPS + 1).ok, "a step that was lost has none of its own"


def test_the_table_says_what_failed_and_where_the_time_went():
    shown = table(replace(GOOD, seconds=12.5, phases={"trained": 7.6, "killed": 3.2}))
    assert shown.title == "capstan smoke: everything holds (12.5 s on cpu)"
    assert shown.caption == "The time went into: trained 8 s, killed 3 s."
    assert {str(cell) for cell in shown.columns[3].cells} == {"ok"}
    shown = table(replace(GOOD, loss_last=7.5, seconds=12.5, error="no end after 900 s"))
    assert shown.title == "capstan smoke: NOT OK (12.5 s on cpu)"
    assert shown.caption == "no end after 900 s"
    assert [str(cell) for cell in shown.columns[3].cells] == ["FAILED"] + ["ok"] * 7
    assert str(next(iter(shown.columns[1].cells))) == "7 -> 7.5 nats"


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
