"""The command a newcomer runs, whole: real ranks, real S3 server, a real kill, another world size, a verified
adapter.
"""

import json

import pytest

from tests.cli.conftest import Capstan
from trainer.export.figures import Proof

pytestmark = pytest.mark.long

REQUIRED = {
    "ok",
    "steps",
    "loss_first",
    "loss_last",
    "killed_at_step",
    "resumed_at_step",
    "world_before",
    "world_after",
    "resume_loss_gap",
    "proof",
    "checkpoints",
    "seconds",
}


@pytest.mark.timeout(1800)
def test_smoke_proves_the_life_of_a_run_that_learns_from_rewards(capstan: Capstan):
    done = capstan("smoke", "--online", "--json", timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["ok"] is True
    assert (result["chapters"], result["world_before"], result["world_after"]) == (15, 2, 1)
    assert 0 < result["reward_first"] < 1
    assert 0 < result["resumed_at_step"] <= result["killed_at_step"] < 15
    assert Proof(**result["proof"]).holds


@pytest.mark.timeout(1800)
def test_smoke_proves_that_a_run_over_pictures_learns_to_see(capstan: Capstan):
    pytest.importorskip("torchvision")
    done = capstan("smoke", "--images", "--json", timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["ok"] is True
    assert (result["steps"], result["world_before"], result["world_after"]) == (40, 2, 1)
    assert 0 < result["resumed_at_step"] <= result["killed_at_step"] < 40
    assert result["sight"]["before"] < 0.1
    assert result["sight"]["after"] >= 0.8
    assert result["sight"]["shuffled"] <= 0.65


@pytest.mark.timeout(600)
def test_smoke_proves_the_whole_life_of_a_run(capstan: Capstan):
    done = capstan("smoke", "--json", timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result.keys() >= REQUIRED
    assert result["ok"] is True
    assert result["steps"] == 15
    assert result["loss_last"] < result["loss_first"]
    assert 0 < result["resumed_at_step"] <= result["killed_at_step"] < 15
    assert (result["world_before"], result["world_after"]) == (2, 1)
    assert 0 <= result["resume_loss_gap"] <= 1e-3
    proof = Proof(**result["proof"])
    assert proof.holds
    assert (proof.computed_in, proof.rows) == ("fp32", "8 rows of the training data")
    assert result["checkpoints"] >= 2
    assert result["store"].startswith("S3")
    assert all(check["held"] for check in result["checks"])
