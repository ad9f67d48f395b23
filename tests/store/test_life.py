"""A run's life over az:// and over a second S3 server: train, go on, verify, export, by the command."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.smoke.local_s3 import S3Server, undisturbed_ports
from tests.forked import run_command
from tests.material import Workshop, make_data
from tests.store.conftest import BUCKET
from tests.store.proxy import Fault, How, faulty_proxy
from trainer.run import layout
from trainer.run.evaluations import read_evaluation
from trainer.run.records import generations, read_records
from trainer.state.checkpoint.manifest import committed_steps
from trainer.store.store import open_store

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
    environment = {
        **os.environ,
        **request.getfixturevalue(server),
        **ONE_RANK,
        "MASTER_PORT": str(undisturbed_ports(1)[0]),
    }
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


KINDS = (
    "config.yaml|owners/|settings/|metrics/|logs/|text/|/data/.*tokens|/data/.*documents|/data/.*blocks|/data/.*manifest|"
    "shard-|step-[0-9]+/manifest|evaluations/|adapter_model|adapter_config|README.md"
).split("|")


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("how", ["lost", "short", "twice", "late", "refused"])
def test_a_life_whose_answers_go_wrong_once_for_each_kind_of_object(how: How, s3: S3Server, tmp_path: Path) -> None:
    store, method = f"{s3.uri('life-of-faults')}/{how}", "GET" if how == "short" else "PUT"
    workshop = Workshop(tmp_path)
    faults = [Fault(method, kind, how, seconds=8.0) for kind in KINDS]
    with faulty_proxy(s3.endpoint, faults) as url:
        environment = {**os.environ, **ONE_RANK, "AWS_ENDPOINT_URL": url, "MASTER_PORT": str(undisturbed_ports(1)[0])}

        def capstan(*arguments: Any) -> str:
            done = run_command([*map(str, arguments)], tmp_path, environment, timeout=600)
            assert done.returncode == 0, done.stderr[-3000:]
            return done.stdout

        other = make_data(tmp_path / "eval.jsonl", seed=9)
        settings = (f"run.store={store}", "train.steps=2", "checkpoint.every_steps=1", f"data.eval=[{{path: {other}}}]")
        config = workshop.config("life", *settings, "run.store_timeout=5")
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        capstan("train", "run.yaml")
        capstan("resume", f"{store}/life", "train.steps=4")
        verified = json.loads(capstan("checkpoints", "verify", f"{store}/life", "--json"))
        assert "damaged" not in json.dumps(verified)
        capstan("evaluate", f"{store}/life")
        assert json.loads(capstan("export", f"{store}/life", f"{store}/adapter", "--json"))["step"] == 4
    struck = {fault.path for fault in faults if fault.struck}
    assert len(struck) > len(KINDS) // 2, struck
    run = open_store(f"{store}/life")
    assert read_evaluation(run, 4)["sets"].keys() == {"eval"}
    assert committed_steps(run) == [4, 3, 2]
    # An empty claim of a start whose answer was lost is nobody's, and the next number is taken.
    assert [r["step"] for g in generations(run) for r in read_records(run, g) if r["kind"] == "step"] == [1, 2, 3, 4]
    assert not [entry.key for entry in run.list(layout.CHECKPOINTS) if "damaged" in entry.key]
