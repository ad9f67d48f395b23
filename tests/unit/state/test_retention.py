"""Retention removes what its rules do not keep, and what no commit refers to once it is old."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.checkpoints import commit, manifest, write_shards
from trainer.config import Checkpoint
from trainer.errors import NotFound
from trainer.run import layout
from trainer.state.checkpoint import retention
from trainer.state.checkpoint.manifest import (
    CheckpointManifest,
    chosen_step,
    committed_steps,
    read_doubt,
    read_manifest,
    step_folders,
    write_doubt,
)
from trainer.state.checkpoint.retention import Removal, plan_removal, removable, remove
from trainer.store.store import PART_BYTES, Store, open_store


@pytest.fixture
def run(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def later(hours: float) -> Callable[[], float]:
    return lambda now=time.time: now() + 3600 * hours


LOSSES = {10: 3.0, 20: 1.0, 30: 2.0, 50: 4.0}


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (Checkpoint(keep_last=2), [60, 50]),
        (Checkpoint(keep_last=9), [60, 50, 40, 30, 20, 10]),
        (Checkpoint(keep_last=1, keep_every=20), [60, 40, 20]),
        (Checkpoint(keep_last=1, keep_best=1), [60, 20]),
        (Checkpoint(keep_last=1, keep_best=3), [60, 30, 20, 10]),
        (Checkpoint(keep_last=1, keep_best=9), [60, 50, 30, 20, 10]),
        (Checkpoint(keep_last=1, keep_every=50, keep_best=1), [60, 50, 20]),
    ],
)
def test_kept_are_the_newest_every_so_many_and_the_best(rules: Checkpoint, kept: list[int]) -> None:
    steps = [60, 50, 40, 30, 20, 10]
    assert [step for step in steps if step not in removable(rules, steps, LOSSES)] == kept


def test_of_equal_losses_the_newer_is_kept() -> None:
    assert removable(Checkpoint(keep_last=1, keep_best=1), [3, 2, 1], {2: 1.0, 1: 1.0}) == [1]


def test_losses_come_from_the_manifests_and_a_damaged_one_has_none(run: Store) -> None:
    for step, loss in ((1, 0.5), (2, 0.1), (3, None), (4, 0.9)):
        commit(run, step, eval_loss=loss)
    run.put(layout.manifest(2), b"{")
    assert plan_removal(run, Checkpoint(keep_last=1, keep_best=1)).kept == [4, 1]


def test_losses_over_other_data_than_the_newest_are_no_better_ones(run: Store) -> None:
    for step, loss, data in ((1, 0.1, "easy"), (2, 0.9, "hard"), (3, 0.8, "hard"), (4, None, None)):
        commit(run, step, eval_loss=loss)
        run.put(layout.manifest(step), replace(read_manifest(run, step), eval_data=data).to_json())
    assert chosen_step(run, None, best=True) == 3
    assert plan_removal(run, Checkpoint(keep_last=1, keep_best=1), proven=4).steps == [2, 1]


def test_a_loss_from_before_its_data_was_recorded_counts_as_one_over_the_same(run: Store) -> None:
    for step, loss, data in ((1, 0.1, None), (2, 0.9, "hard"), (3, 0.05, "easy"), (4, 0.8, "hard")):
        commit(run, step, eval_loss=loss)
        run.put(layout.manifest(step), replace(read_manifest(run, step), eval_data=data).to_json())
    assert chosen_step(run, None, best=True) == 1


def test_a_removal_deletes_the_manifest_before_its_shards(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(run, 1)
    commit(run, 2)
    deleted: list[str] = []
    plain = Store.delete

    def observed(store: Store, key: str) -> None:
        deleted.append(key)
        plain(store, key)

    monkeypatch.setattr(Store, "delete", observed)
    removal = plan_removal(run, Checkpoint(keep_last=1))
    assert (removal.steps, removal.kept, removal.orphans) == ([1], [2], [])
    assert removal.bytes == sum(entry.size for entry in run.list(layout.checkpoint(1)))
    assert deleted == [], "a plan changes nothing"
    remove(run, removal)
    assert deleted == [layout.manifest(1), *(layout.shard(1, "000001-000001", rank) for rank in range(2))]
    assert run.list(layout.checkpoint(1)) == []
    assert committed_steps(run) == [2]


def damage(run: Store, step: int) -> None:
    key = layout.shard(step, "000001-000001", 1)
    run.put(key, run.get(key)[:-1] + b"?")


def cover_nothing(run: Store, step: int) -> None:
    """A manifest of two shards that says it were all of three: whole by its hash, but not by what it covers."""
    written = manifest(step, write_shards(run, step, ranks=3)[:2])
    run.put(layout.manifest(step), written.to_json())


def no_manifest(run: Store, step: int) -> None:
    run.put(layout.manifest(step), b"{")


@pytest.mark.parametrize("harm", [damage, cover_nothing, no_manifest])
def test_the_last_whole_checkpoint_stays_when_all_newer_are_damaged(run: Store, harm: Callable[..., None]) -> None:
    for step in (1, 2, 3, 4, 5):
        commit(run, step)
    harm(run, 5)
    harm(run, 4)
    removal = plan_removal(run, Checkpoint(keep_last=1))
    assert (removal.kept, removal.steps, removal.proven) == ([5, 3], [4, 2, 1], 3)
    assert removal.damaged.keys() == {5, 4}
    assert str(removal.warning).startswith("the checkpoint of step 5 is damaged: ")
    assert str(removal.warning).endswith("Step 3 stays.")
    remove(run, removal)
    assert committed_steps(run) == [5, 3]


def test_a_checkpoint_that_somebody_removes_meanwhile_is_none_that_stays(
    run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        commit(run, step)

    def read(folder: Store, step: int) -> CheckpointManifest:
        if step == 3:
            raise NotFound("it is gone")
        return read_manifest(folder, step)

    monkeypatch.setattr(retention, "read_manifest", read)
    removal = plan_removal(run, Checkpoint(keep_last=1))
    assert (removal.steps, removal.proven) == ([1], 2)


def test_nothing_is_removed_when_no_checkpoint_is_whole(run: Store) -> None:
    for step in (1, 2, 3):
        commit(run, step)
        damage(run, step)
    removal = plan_removal(run, Checkpoint(keep_last=1))
    assert (removal.kept, removal.steps, removal.bytes, removal.proven) == ([3, 2, 1], [], 0, None)
    assert "Nothing is removed" in str(removal.warning)


def test_a_checkpoint_that_is_known_to_be_whole_is_not_read_again(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        commit(run, step)
    read: list[str] = []
    plain = Store.chunks
    monkeypatch.setattr(Store, "chunks", lambda store, key, size: read.append(key) or plain(store, key, size))
    assert plan_removal(run, Checkpoint(keep_last=9)).proven is None
    assert plan_removal(run, Checkpoint(keep_last=2), proven=2).proven == 2
    assert read == []
    assert plan_removal(run, Checkpoint(keep_last=2), proven=1).proven == 3
    assert read == [layout.shard(3, "000001-000001", rank) for rank in range(2)]


def test_orphans_go_when_they_are_old_and_what_a_commit_names_stays(run: Store) -> None:
    commit(run, 5, attempt="000002-000001")
    beside = f"{layout.adapter(5)}/adapter_model.safetensors"
    run.put(beside, b"exported")
    assert [found.attempts for found in step_folders(run)] == [1], "the adapter is none"
    orphans = [
        layout.damaged_manifest(5, 2),
        layout.shard(5, "000001-000003", 0),  # of a dead attempt at a step that was committed later
        layout.shard(7, "000001-000004", 1),  # of a save that never came to its commit
    ]
    for key in orphans:
        run.put(key, b"lost")
    assert plan_removal(run, Checkpoint(keep_last=1), now=later(23)) == Removal(kept=[5])
    old = plan_removal(run, Checkpoint(keep_last=1), now=later(25))
    assert (sorted(old.orphans), old.bytes) == (sorted(orphans), 12)
    assert plan_removal(run, Checkpoint(keep_last=1), orphan_hours=26, now=later(25)).orphans == []
    remove(run, old)
    remove(run, old)
    left = [entry.key for entry in run.list()]
    assert sorted(left) == sorted(
        [*(layout.shard(5, "000002-000001", rank) for rank in range(2)), layout.manifest(5), beside]
    )


def test_what_a_save_that_was_killed_has_half_written_goes_too(run: Store) -> None:
    commit(run, 5)
    killed, names = layout.shard(7, "000001-000004", 0), list[str]()

    def pieces() -> Iterator[bytes]:
        yield b"half"
        names.extend(entry.key for entry in run.half_written(layout.checkpoint(5)))

    run.put_chunks(layout.shard(5, "000001-000003", 0), pieces(), PART_BYTES + 1)
    assert names == [f"{layout.shard(5, '000001-000003', 0)}#1"], "it has this name until it is whole"
    path = Path(f"{run.local_folder}/{killed}#1")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half")
    assert run.list(layout.checkpoint(7)) == [], "no listing shows it"
    assert plan_removal(run, Checkpoint(keep_last=1), now=later(23)).orphans == []
    old = plan_removal(run, Checkpoint(keep_last=1), now=later(25))
    assert f"{killed}#1" in old.orphans
    remove(run, old)
    remove(run, old)
    assert run.half_written(layout.CHECKPOINTS) == []


def test_a_save_that_is_under_way_has_no_orphans_whatever_the_clock_does(run: Store) -> None:
    commit(run, 5)
    keys = [layout.shard(7, layout.attempt(2, save), 0) for save in (9, 10, 11)]
    for key in keys:
        run.put(key, b"on its way")
    found = plan_removal(run, Checkpoint(keep_last=1), saving=layout.attempt(2, 10), now=later(10**6))
    assert found.orphans == keys[:1]


def test_orphans_are_old_by_the_stores_clock(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(run, 5)
    run.put(layout.shard(7, "000001-000004", 0), b"on its way")
    monkeypatch.setattr(time, "time", later(48))
    assert plan_removal(run, Checkpoint(keep_last=1)).orphans == []


def test_why_a_checkpoint_is_in_doubt_is_no_orphan(run: Store) -> None:
    written = commit(run, 5, attempt="000002-000001")
    write_doubt(run, [5], written.generation, "a rank computed wrongly")
    run.put(layout.shard(5, "000001-000003", 0), b"lost")
    old = plan_removal(run, Checkpoint(keep_last=1), now=later(25))
    assert old.orphans == [layout.shard(5, "000001-000003", 0)]
    remove(run, old)
    assert read_doubt(run, written) == "a rank computed wrongly"


def test_beside_a_damaged_manifest_nothing_is_an_orphan(run: Store) -> None:
    commit(run, 5)
    run.put(layout.shard(5, "000009-000001", 0), b"x")
    run.put(layout.manifest(5), b"{")
    assert plan_removal(run, Checkpoint(keep_last=1), now=later(1000)).orphans == []
