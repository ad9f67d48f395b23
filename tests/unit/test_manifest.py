"""A manifest proves what it says, or is refused with the reason."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from trainer.checkpoint.manifest import (
    CheckpointManifest,
    committed_steps,
    parse_manifest,
    read_manifest,
    readable_manifests,
)
from trainer.checkpoint.shard import Shard, verify_shard
from trainer.errors import StorageError
from trainer.run import layout
from trainer.store import Store, open_store


def manifest(step: int, shards: list[Shard] | None = None, eval_loss: float | None = None) -> CheckpointManifest:
    return CheckpointManifest(
        step=step,
        generation=2,
        world_size=2,
        created=1.5,
        updates=step,
        position={"epoch": 1, "window": 2, "bin": 12},
        dataset="d" * 20,
        order={"seed": 3},
        base={"path": "/models/b", "quant.type": "nf4"},
        adapter={"rank": 4},
        groups={"lora_A": {"weight_decay": 0.1}},
        versions={"torch": "2"},
        eval_loss=eval_loss,
        shapes={"layer.lora_A.weight": [4, 5]},
        shards=shards or [Shard("a", 10, "0" * 64, {"layer.lora_A.weight": (0, 20)})],
    )


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def commit(run: Store, step: int) -> None:
    run.put(layout.shard(step, "attempt", 0), b"data")
    run.create(layout.manifest(step), manifest(step).to_json())


def test_a_manifest_comes_back_as_it_was() -> None:
    assert parse_manifest(manifest(7).to_json(), "here") == manifest(7)


def damaged(change: Any) -> bytes:
    tree = json.loads(manifest(7).to_json())
    change(tree)
    return json.dumps(tree).encode()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (manifest(7).to_json()[:-30], "runs/step is damaged: it is not a manifest"),
        (b"", "runs/step is damaged: it is not a manifest"),
        (b"[1, 2]", "runs/step is damaged: it is not a manifest"),
        (b"\xff\xfe\x00", "runs/step is damaged: it is not a manifest"),
        (damaged(lambda tree: tree.pop("sha256")), "runs/step is damaged: it is not a manifest"),
        (damaged(lambda tree: tree["body"].update(step=8)), "its content does not match its sha256"),
        (damaged(lambda tree: tree["body"]["shards"].clear()), "its content does not match its sha256"),
        (damaged(lambda tree: tree.update(sha256="0" * 64)), "its content does not match its sha256"),
        (damaged(lambda tree: tree.update(format=3)), "is of format 3; this version reads format 2"),
    ],
)
def test_what_is_no_whole_manifest_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(StorageError, match=reason):
        parse_manifest(data, "runs/step")


def test_only_a_manifest_makes_a_checkpoint(run: Store) -> None:
    commit(run, 10)
    commit(run, 9)
    commit(run, 100)
    run.put(layout.shard(200, "attempt", 0), b"data")
    assert committed_steps(run) == [100, 10, 9]


def test_readable_manifests_are_newest_first_and_say_what_was_passed_over(run: Store) -> None:
    for step in (1, 2, 3):
        commit(run, step)
    run.put(layout.manifest(3), b"{")
    skipped: list[str] = []
    assert [found.step for found in readable_manifests(run, skipped)] == [2, 1]
    assert len(skipped) == 1
    assert layout.manifest(3) in skipped[0]


def test_a_step_is_committed_once(run: Store) -> None:
    commit(run, 1)
    with pytest.raises(StorageError, match="exists already"):
        run.create(layout.manifest(1), b"another")
    assert read_manifest(run, 1) == manifest(1)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"whole", None), (b"whol", "has 4 bytes instead of 5"), (b"whole"[::-1], "does not match its sha256")],
)
def test_a_shard_is_verified_by_its_size_and_hash(run: Store, content: bytes, problem: str | None) -> None:
    run.put("shard", content)
    found = verify_shard(run, Shard("shard", 5, hashlib.sha256(b"whole").hexdigest(), {}))
    assert found is None if problem is None else problem in str(found)


def test_a_missing_shard_is_a_problem_and_no_crash(run: Store) -> None:
    assert "does not exist" in str(verify_shard(run, Shard("gone", 5, "", {})))


class FailingStore(Store):
    """A store that answers nothing but listings: down for a while, not damaged."""

    def get_range(self, key: str, start: int, end: int) -> bytearray:
        raise StorageError(f"503 for {key}")

    def get(self, key: str) -> bytes:
        raise StorageError(f"503 for {key}")


def test_a_store_that_fails_is_not_a_damaged_checkpoint(run: Store) -> None:
    commit(run, 5)
    failing = FailingStore(run.uri, run._backend, run._prefix)
    with pytest.raises(StorageError, match="503"):
        list(readable_manifests(failing, []))
    with pytest.raises(StorageError, match="503"):
        verify_shard(failing, Shard(layout.shard(5, "attempt", 0), 4, "", {}))
