"""The smoke run's verdict: every claim must have been measured and must hold."""

from dataclasses import replace

import pytest

from launcher.smoke.verdict import STEPS, SmokeResult

GOOD = SmokeResult(
    steps=STEPS,
    loss_first=7.0,
    loss_last=6.5,
    killed_at_step=8,
    resumed_at_step=5,
    world_before=2,
    world_after=1,
    resume_loss_gap=0.0,
    adapter_logits_max_diff=0.01,
    adapter_logits_allowed=0.05,
    adapter_logits_effect=0.8,
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
        {"adapter_logits_max_diff": 0.06},
        {"adapter_logits_max_diff": float("nan")},
        {"adapter_logits_max_diff": None},
        {"adapter_logits_effect": 0.04},
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
