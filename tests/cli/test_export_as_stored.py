"""`capstan export --format merged as=stored --verify`, on a run that was really trained over a base in INT4."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Capstan
from tests.dist import runs
from tests.dist.launch import launch
from tests.material import Workshop, make_base
from tests.stored import store_as
from trainer.config import dump_config
from trainer.run import layout
from trainer.store.store import Store

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Store:
    workshop = Workshop(tmp_path_factory.mktemp("as-stored"))
    plain = make_base(workshop.folder / "plain", hidden_size=64, intermediate_size=128, head_dim=16)
    base = store_as(plain, workshop.folder / "int4", "int4-32")
    settings = (f"model.base={base}", "quant.type=stored", "train.steps=8", "optim.lr=0.02")
    config = workshop.config("done", *settings)
    run = workshop.store.sub("done")
    run.put(layout.CONFIG, dump_config(config).encode())
    (outcome,) = launch(1, runs.run, dump_config(config), workshop.prepare(config).train, timeout=200)
    assert outcome["outcome"] == "finished"
    return run


def test_the_share_that_is_kept_is_measured_printed_and_in_the_card(
    capstan: Capstan, run: Store, tmp_path: Path
) -> None:
    command = ("export", run.uri, tmp_path / "merged", "--format", "merged", "as=stored", "--verify")
    done = capstan(*command, timeout=300)
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "merged/README.md").read_text()
    assert "merged into the codes of its base" in card
    for where in (done.stdout, card):
        text = " ".join(where.split())
        assert "of the adapter's gain" in text
        assert "95 % interval" in text
        assert "% of the codes changed" in text
    again = capstan(*command, "--json", timeout=300)  # it is there already, and is proven as it is
    assert again.returncode == 0, again.stderr
    proof = json.loads(again.stdout)["proof"]
    assert proof["kept"] > 0.8
    assert proof["kept_low"] <= proof["kept"] <= proof["kept_high"]
    assert 0 < proof["codes_changed"] < proof["codes"]
    assert proof["kl"] < 0.2 * proof["kl_effect"]


def test_codes_that_the_base_is_not_stored_in_are_measured_beside_the_base_in_the_same_codes(
    capstan: Capstan, run: Store, tmp_path: Path
) -> None:
    command = ("export", run.uri, tmp_path / "merged", "--format", "merged", "as=mxfp4", "--verify", "--json")
    done = capstan(*command, timeout=300)
    assert done.returncode == 0, done.stderr
    proof = json.loads(done.stdout)["proof"]
    assert proof["kept"] > 0.8
    assert 0 < proof["codes_changed"] < proof["codes"]
    settings = json.loads((tmp_path / "merged/config.json").read_text())
    assert settings["quantization_config"]["format"] == "mxfp4-pack-quantized"
