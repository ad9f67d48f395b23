"""A run's life over az:// and over a second S3 server: train, go on, verify, export, by the command."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.smoke.local_s3 import free_ports
from tests.forked import run_command
from tests.material import Workshop
from tests.store.conftest import BUCKET

SCHEME = {"azurite": "az", "moto": "s3"}
# One rank as torchrun would start it: without Ray, which has nothing to do with the store.
ONE_RANK = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
}


@pytest.mark.parametrize("server", ["azurite", pytest.param("moto", marks=pytest.mark.long)])
def test_train_resume_verify_and_export(server: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    environment = {**os.environ, **request.getfixturevalue(server), **ONE_RANK, "MASTER_PORT": str(free_ports(1)[0])}
    store = f"{SCHEME[server]}://{BUCKET}/runs"

    def capstan(*arguments: Any) -> str:
        done = run_command([*map(str, arguments)], tmp_path, environment, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    config = Workshop(tmp_path).config("life", f"run.store={store}", "train.steps=2", "checkpoint.every_steps=1")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    capstan("train", "run.yaml")
    capstan("resume", f"{store}/life", "train.steps=4")
    assert "damaged" not in capstan("checkpoints", "verify", f"{store}/life")
    assert json.loads(capstan("export", f"{store}/life", f"{store}/adapter", "--json"))["step"] == 4
