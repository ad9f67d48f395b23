"""A run whose newest checkpoints are damaged keeps its last whole one, exports it and goes on from it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Capstan
from trainer.run import layout
from trainer.state.checkpoint.manifest import committed_steps, read_manifest
from trainer.store.store import Store, open_store

pytestmark = pytest.mark.long


def reseal(run: Store, step: int, **changes: Any) -> None:
    """Change the body of a manifest as its writer could: with the right hash."""
    tree = json.loads(run.get(layout.manifest(step)))
    tree["body"].update(changes)
    text = json.dumps(tree["body"], sort_keys=True, separators=(",", ":"))
    run.put(layout.manifest(step), json.dumps(tree | {"sha256": hashlib.sha256(text.encode()).hexdigest()}).encode())


@pytest.mark.timeout(900)
def test_the_last_whole_checkpoint_outlives_a_prune_and_is_exported_and_resumed(
    capstan: Capstan, config: Path, tmp_path: Path
) -> None:
    store, run = ("--store", tmp_path / "store"), open_store(str(tmp_path / "store/mine"))
    rules = ("train.steps=4", "checkpoint.every_steps=2", "checkpoint.keep_last=9")
    trained = capstan("train", config, *rules, timeout=400)
    assert trained.returncode == 0, trained.stderr
    assert committed_steps(run) == [4, 2, 1]
    key = read_manifest(run, 4).shards[0].key
    run.put(key, run.get(key)[:-1] + b"?")
    reseal(run, 2, shards=[])

    verified = capstan("checkpoints", "verify", "mine", *store, "--json")
    assert verified.returncode == 6
    assert json.loads(verified.stdout)["problems"].keys() == {"4", "2"}

    for step in (4, 2):
        refused = capstan("export", "mine", f"adapter-{step}", "--step", step, *store)
        assert refused.returncode == 6, refused.stderr
        assert f"the checkpoint of step {step} of {run.uri} is not whole" in " ".join(refused.stderr.split())
        assert not (tmp_path / f"adapter-{step}").exists()

    pruned = capstan("checkpoints", "prune", "mine", "--keep-last", 1, *store)
    assert pruned.returncode == 0, pruned.stderr
    text = " ".join(pruned.stdout.split())
    assert "removed checkpoints of steps: 2;" in text
    assert "Kept steps: 1, 4." in text
    assert "the checkpoint of step 4 is damaged" in text
    assert committed_steps(run) == [4, 1]

    exported = capstan("export", "mine", "adapter", "--json", *store)
    assert json.loads(exported.stdout)["step"] == 1, exported.stderr
    assert "the checkpoint of step 4 is damaged, so that of step 1 is exported" in exported.stderr
    resumed = capstan("resume", "mine", *store, "--json", timeout=400)
    assert resumed.returncode == 0, resumed.stderr
    assert any("manifest.damaged" in entry.key for entry in run.list(layout.checkpoint(4)))
    assert json.loads(capstan("checkpoints", "verify", "mine", *store, "--json").stdout)["problems"] == {}
    assert committed_steps(run)[0] == 4
