"""A file of pairs, one command, and an adapter that is proven: preferences as a user meets them."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Capstan
from tests.material import make_pairs

DPO = ("objective.name=dpo", "data.format=preference", "data.sequence_length=96")


@pytest.mark.long
def test_pairs_are_checked_trained_on_and_what_was_learnt_is_exported(
    capstan: Capstan, config: Path, tmp_path: Path
) -> None:
    data = f"data.train=[{{path: {make_pairs(tmp_path / 'pairs.jsonl')}}}]"
    run = (*DPO, data, "train.steps=6", "optim.lr=0.02", "model.dtype=fp32", "cluster.workers=1")
    checked = capstan("data", "check", config, *run, "--json")
    assert checked.returncode == 0, checked.stderr
    found = json.loads(checked.stdout)["train"]
    assert (found["rows"], found["documents"], found["bad_rows"]) == (12, 12, 0)
    done = capstan("train", config, *run, "--json")
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert (status["state"], status["step"]) == ("finished", 6)
    assert status["loss"] < status["loss_first"] == pytest.approx(0.693147, abs=1e-4)
    report = (tmp_path / "store/mine/report.html").read_text(encoding="utf-8")
    assert "objective dpo" in report
    assert "nats a pair" in report
    exported = capstan("export", tmp_path / "store/mine", tmp_path / "adapter", "--verify", "--json")
    assert exported.returncode == 0, exported.stderr
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_what_does_not_fit_is_refused_before_anything_is_written(
    capstan: Capstan, config: Path, tmp_path: Path
) -> None:
    refused = capstan("train", config, "objective.name=dpo")
    assert refused.returncode == 2
    assert "data.format: prompt_completion has no rows for objective.name: dpo." in refused.stderr
    assert not (tmp_path / "store").exists()
